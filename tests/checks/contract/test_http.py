"""What the backend over HTTP makes of a server that is wrong, broken or gone; and how adapters come and go there."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from endpoints.errors import EndpointError, EndpointSilent
from endpoints.openai_backend import OpenAIBackend, open_backend
from repair.adapter_file import read_adapter
from repair.checks.backend import Capability
from repair.checks.backends import Served, files_of
from repair.checks.errors import ArmUnsupported
from repair.lora import LoraAdapter
from repair.report import adapter_digests
from tests.checks.contract.world import (
    LIMIT,
    MISCHIEF_S,
    NAME,
    PROMPTS,
    SAMPLES,
    Files,
    Server,
    asking,
    doubled,
    running,
    served,
)

SECRET = PROMPTS[6]


@pytest.fixture
def wish(files: Files, server: Server, seen: Path) -> Served:
    return served(files, server.url, seen)


@pytest.fixture
def backend(wish: Served) -> Iterator[OpenAIBackend]:
    with asking(wish, timeout_s=MISCHIEF_S * 50) as found:
        yield found


@pytest.fixture
def adapter(files: Files) -> LoraAdapter:
    return read_adapter(files.first)


def texts(backend: OpenAIBackend) -> list[str]:
    return [reply.text for reply in backend.generate(PROMPTS, max_new_tokens=LIMIT, batch_size=5)]


STRANGE = {
    "stale-by-slot": "stale prefix cache",
    "stale-keys": "stale prefix cache",
    "ignores-adapters": "without it",
}


@pytest.mark.parametrize("how", STRANGE)
def test_a_server_that_answers_with_another_arm_is_refused_at_the_start(wish: Served, server: Server, how: str) -> None:
    """Nothing was measured yet, and nothing will be."""
    server.behave(how)
    with pytest.raises(EndpointError, match=STRANGE[how]), open_backend(wish):
        pass
    assert server.behave()["loaded"] == []


def test_a_server_that_remembers_by_name_is_asked_by_names_that_say_what_is_in_them(
    wish: Served, server: Server, adapter: LoraAdapter
) -> None:
    """Other bytes never come under a known name: what they say is their own, although the server reuses replies."""
    with asking(wish) as honest, honest.arm(doubled(adapter)):
        wanted = texts(honest)
    server.behave("stale-by-name")
    with open_backend(wish) as backend:
        with backend.arm(adapter):
            first = texts(backend)
        with backend.arm(doubled(adapter)):
            assert texts(backend) == wanted != first


def test_names_are_the_digest_of_the_bytes_and_of_no_other_session(
    wish: Served, server: Server, files: Files, adapter: LoraAdapter
) -> None:
    """The uploaded files are sent as they are; two sessions on one server do not take each other's adapter away."""
    wish = replace(wish, files=files_of((adapter, files.first)))
    digest = adapter_digests(files.first)["digest"].removeprefix("sha256:")
    with asking(wish) as one, asking(wish) as other, other.arm(adapter):
        with one.arm(adapter):
            names = server.behave()["loaded"]
            assert [name.partition("-")[0] for name in names] == [digest] * 2
            assert len(set(names)) == 2
        assert len(texts(other)) == len(PROMPTS)
        with one.arm(doubled(adapter)):
            assert not any(name.startswith(digest) for name in set(server.behave()["loaded"]) - set(names))


def test_nothing_stays_on_the_server_nor_in_the_folder(
    wish: Served, backend: OpenAIBackend, server: Server, adapter: LoraAdapter
) -> None:
    """After the block, after an error in it, and when one arm holds the same adapter twice."""
    assert wish.adapters is not None
    with backend.arms([adapter, adapter, None, doubled(adapter)]):
        assert {path.name for path in wish.adapters.iterdir()} == set(server.behave()["loaded"])
        assert len(server.behave()["loaded"]) == 2
    assert not [*server.behave()["loaded"], *wish.adapters.iterdir()]
    with pytest.raises(RuntimeError, match="stop"), backend.arm(adapter):
        raise RuntimeError("stop")
    assert not [*server.behave()["loaded"], *wish.adapters.iterdir()]


@pytest.mark.parametrize("how", ["reverses", "tells-no-ids", "counts-nothing"])
def test_what_the_protocol_leaves_open_changes_nothing(
    backend: OpenAIBackend, server: Server, adapter: LoraAdapter, how: str
) -> None:
    """Choices in any order, replies without ids, no usage: the same rows, and still a price."""
    with backend.arm(adapter):
        wanted, losses = backend.generate(PROMPTS, max_new_tokens=LIMIT, batch_size=5), backend.loss(SAMPLES)
        server.behave(how)
        before = backend.tokens
        assert backend.generate(PROMPTS, max_new_tokens=LIMIT, batch_size=5) == wanted
        assert backend.loss(SAMPLES) == losses
        assert backend.tokens > before


BROKEN = {
    "drops-a-choice": (EndpointError, "not one by one"),
    "misnumbers": (EndpointError, "not one by one"),
    "another-model": (EndpointError, "another model answered"),
    "filters": (EndpointError, "content_filter"),
    "truncates": (EndpointError, "no JSON"),
    "fails": (EndpointSilent, "status 500"),
    "hangs-up": (EndpointSilent, "POST completions"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_an_answer_that_is_not_whole_is_an_error_without_a_word_of_the_prompt(
    backend: OpenAIBackend, server: Server, adapter: LoraAdapter, how: str
) -> None:
    """No row is made up, none is shifted; the adapter is taken off all the same."""
    kind, said = BROKEN[how]

    def ask() -> None:
        with backend.arm(adapter):
            server.behave(how)
            texts(backend)

    with pytest.raises(kind, match=said) as caught:
        ask()
    assert SECRET not in json.dumps(caught.value.as_dict())
    assert server.behave()["loaded"] == []


@pytest.mark.parametrize("how", ["tells-no-logprobs", "adds-a-token"])
def test_scores_that_are_not_of_the_tokens_sent_are_refused(backend: OpenAIBackend, server: Server, how: str) -> None:
    """A loss over shifted tokens looks like any other."""
    server.behave(how)
    with pytest.raises(EndpointError, match=r"none came|was scored as"):
        backend.loss(SAMPLES)
    with pytest.raises(EndpointError, match=r"none came|was scored as"):
        backend.margin(PROMPTS)


def test_a_server_that_hangs_is_silent(wish: Served, server: Server) -> None:
    """After the time that was given, as often as it is tried."""
    with asking(wish, timeout_s=MISCHIEF_S) as backend:
        server.behave("hangs")
        with pytest.raises(EndpointSilent, match="ReadTimeout"):
            backend.generate(PROMPTS[:1], max_new_tokens=2)


def test_a_server_that_dies_is_silent_and_leaves_no_folder(files: Files, seen: Path, adapter: LoraAdapter) -> None:
    """In the middle of a measurement, by its process; taking the adapter off fails too, and does not hide why."""

    def ask(wish: Served, mortal: Server) -> None:
        with asking(wish) as backend, backend.arm(adapter):
            assert len(texts(backend)) == len(PROMPTS)
            mortal.die()
            texts(backend)

    with running(files) as mortal, pytest.raises(EndpointSilent, match="POST completions"):
        ask(served(files, mortal.url, seen), mortal)
    assert list(seen.iterdir()) == []


def test_a_server_that_is_gone_is_silent(wish: Served) -> None:
    """Nobody listens on port 1."""
    with pytest.raises(EndpointSilent), asking(replace(wish, url="http://127.0.0.1:1/v1")):
        pass


def test_an_unknown_model_is_named_with_those_that_are_served(wish: Served) -> None:
    there = f"no model is served as other; there are: {NAME}"
    with pytest.raises(EndpointError, match=there), asking(replace(wish, model="other")):
        pass


def test_a_server_that_loads_nothing_says_how_to_start_it_and_still_answers(
    wish: Served, server: Server, adapter: LoraAdapter
) -> None:
    """The aligned model can be measured; an adapter cannot, and is not measured as the aligned model."""
    server.behave("loads-nothing")
    with open_backend(wish) as backend:
        assert not backend.capabilities().has(Capability.ADAPTERS)
        assert backend.capabilities().has(Capability.LOSS)
        with pytest.raises(EndpointError, match="--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            backend.arm(adapter).__enter__()
        assert len(texts(backend)) == len(PROMPTS)


def test_a_server_that_tells_no_log_probabilities_has_no_losses(wish: Served, server: Server) -> None:
    """Nor adapters: without them nobody can see whether one was applied."""
    server.behave("tells-no-logprobs")
    with open_backend(wish) as backend:
        for one in (Capability.LOSS, Capability.MARGIN, Capability.ADAPTERS):
            assert "echo with logprobs" in backend.capabilities().missing[one]
        with pytest.raises(EndpointError, match="echo with logprobs"):
            backend.loss(SAMPLES)


REFUSED = {"refuses-adapters": "status 500", "sees-nothing": "same path"}


@pytest.mark.parametrize("how", REFUSED)
def test_an_adapter_that_is_refused_is_named(wish: Served, server: Server, adapter: LoraAdapter, how: str) -> None:
    """By the name that the server's log has as well; nothing is left in the folder."""
    server.behave(how)
    with asking(wish) as backend, pytest.raises(ArmUnsupported, match=REFUSED[how]) as caught, backend.arm(adapter):
        pass
    assert len(caught.value.field.partition("-")[0]) == 64
    assert wish.adapters is not None
    assert list(wish.adapters.iterdir()) == []


@pytest.mark.parametrize("how", REFUSED)
def test_a_server_that_refuses_the_probes_has_no_adapters(wish: Served, server: Server, how: str) -> None:
    """An ordinary one: whatever is wrong, it is not the upload; told before anything is asked of it."""
    server.behave(how)
    with open_backend(wish) as backend:
        assert REFUSED[how] in backend.capabilities().missing[Capability.ADAPTERS]


def test_what_vllm_would_refuse_or_alter_is_not_sent(
    backend: OpenAIBackend, server: Server, adapter: LoraAdapter
) -> None:
    """An engine that dies of a DoRA takes every other measurement with it."""
    import torch

    sized = [replace(one, magnitude=torch.ones(one.shape[0])) for one in adapter.layers]
    before = server.behave()["seen"]
    with pytest.raises(ArmUnsupported, match="DoRA is refused"), backend.arm(replace(adapter, layers=tuple(sized))):
        pass
    assert server.behave()["seen"] == before


def test_trying_out_costs_no_arm_anything(openai: OpenAIBackend, wish: Served) -> None:
    """A report must not tell who came first."""
    with open_backend(wish) as fresh:
        assert fresh.tokens == 0
        assert fresh.fingerprint() == openai.fingerprint()
        assert fresh.fingerprint()["version"] == "1.2.3"
