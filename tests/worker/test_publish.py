"""What is kept of a plan: canonical, the same for equal inputs, signed, and nothing of a quarantined one."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import platform
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import rfc8785
import torch
from hypothesis import given
from hypothesis import strategies as st

from gate.admission import admit
from gate.digest import root_digest
from gate.model import file_digests
from ledger.blobs import BlobStore
from ledger.leases import Claim
from ledger.oms import UNCOVERED
from ledger.provenance import statements_for
from ledger.signing import PUBLIC_NAME, Signer
from ledger.tables import Adapter, Reference, Verdict
from ledger.verify import verify_directory
from pages.render import parse, render
from repair.checkpoint import Checkpoint
from repair.checks import planner
from repair.checks.packs import load_pack, pack_digests
from repair.checks.planner import Plan, plan
from repair.checks.rules import RulesJudge
from tests.checks.acting import SAMPLES, SECRET, UPLOAD, Character, chat_of, policy_of
from tests.pages.known import unknown
from tests.worker.house import upload_folder
from worker.choice import MOST
from worker.plain import plain
from worker.publish import PAGE, REPORT, Account, assemble, environment, facts_of, publish, report_of

if TYPE_CHECKING:
    from ledger.results import Result

START = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
JOB = "019ab6a0-5a5a-7000-8000-000000000001"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return upload_folder(tmp_path / "source", readme="# mine\n")


def planned(pair: tuple[Path, Path], work_dir: Path, character: Character) -> Plan:
    aligned, base = map(Checkpoint.open, pair)
    reference = planner.Reference(aligned=aligned, base=base, chat=chat_of(character), digest="sha256:feed")
    policy = policy_of(strength=[0.95, 0.85])
    return plan(UPLOAD, reference=reference, policy=policy, work_dir=work_dir, samples=SAMPLES)


def account_of(
    found: Plan, pair: tuple[Path, Path], source: Path, *, job_id: str = JOB, started: datetime = START
) -> Account:
    aligned, base = map(file_digests, pair)
    files = file_digests(source)
    return Account(
        claim=Claim(
            job_id=job_id, fence=1, attempt=1, max_attempts=3, owner="cpu@here#1", adapter_id="a", reference="tiny",
            spec={"policy": "demo"},
        ),
        adapter=Adapter(
            digest=root_digest(files), files=[{"name": name, "sha256": digest} for name, digest in files.items()]
        ),
        reference=Reference(
            name="tiny", aligned_digest=root_digest(aligned), base_digest=root_digest(base),
            files={"aligned": aligned, "base": base},
        ),
        admission=admit(source),
        plan=found,
        diagnostics={"profile": None},
        device="cpu",
        started_at=started,
        finished_at=started + timedelta(minutes=5),
    )  # fmt: skip


class Shop:
    """Publishes into a blob store of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blobs = BlobStore.open((folder / "blobs").as_uri())
        self.signer = Signer.load_or_create(folder / "keys")

    def publish(self, account: Account, source: Path, name: str) -> Result:
        return publish(account, self.blobs, self.signer, source=source, folder=self.folder / name)

    def core(self, name: str) -> dict[str, bytes]:
        """The files that the signature covers."""
        found = {path.name: path.read_bytes() for path in (self.folder / name).iterdir()}
        assert set(UNCOVERED) <= set(found)
        return {name: data for name, data in found.items() if name not in UNCOVERED}


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def test_equal_work_gives_equal_artifacts(shop: Shop, pair: tuple[Path, Path], source: Path, tmp_path: Path) -> None:
    """Another job, another hour, the same plan: the same bytes under the same digest; only the statements differ."""
    results = []
    for name, job_id, started in (("one", JOB, START), ("two", JOB[:-1] + "2", START + timedelta(days=1))):
        found = planned(pair, tmp_path / f"work-{name}", Character())
        results.append(shop.publish(account_of(found, pair, source, job_id=job_id, started=started), source, name))

    one, two = results
    assert shop.core("one") == shop.core("two")
    assert set(shop.core("one")) == {"README.md", "adapter_config.json", "adapter_model.safetensors", REPORT, PAGE}
    assert shop.core("one")[PAGE].decode() == render(shop.core("one")[REPORT])
    assert one.artifact is not None
    assert two.artifact is not None
    assert one.artifact.digest == two.artifact.digest
    assert one.report_digest == two.report_digest
    assert {statement.digest for statement in one.statements} != {statement.digest for statement in two.statements}


def test_another_machine_makes_the_same_artifact(
    shop: Shop, pair: tuple[Path, Path], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads and the name of its device are signed beside the artifact and are no byte of it."""
    for name, threads, machine in (("one", 3, "x86_64"), ("two", 5, "riscv64")):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        monkeypatch.setattr(platform, "machine", lambda kind=machine: kind)
        account = account_of(planned(pair, tmp_path / f"work-{name}", Character()), pair, source)
        shop.publish(account, source, name)
        internal = provenance_of(account)["internalParameters"]
        assert (internal["threads"], internal["device"]) == (str(threads), machine)

    assert shop.core("one") == shop.core("two")
    assert json.loads(shop.core("one")[REPORT])["environment"]["device_kind"] == "cpu"


def test_a_published_folder_verifies(shop: Shop, pair: tuple[Path, Path], source: Path, tmp_path: Path) -> None:
    """Every file is what was signed, every attestation is about these files; and each of them is in the store."""
    found = planned(pair, tmp_path / "work", Character())
    result = shop.publish(account_of(found, pair, source), source, "artifact")

    report = verify_directory(tmp_path / "artifact", tmp_path / "keys" / PUBLIC_NAME)
    assert report.ok, report.as_dict()
    assert result.artifact is not None
    assert report.root_digest == result.artifact.digest
    assert len(result.statements) == len(report.attestations) == 5
    for file in result.artifact.files:
        assert shop.blobs.read(file["sha256"]) == (tmp_path / "artifact" / file["name"]).read_bytes()


def test_a_changed_byte_no_longer_verifies(shop: Shop, pair: tuple[Path, Path], source: Path, tmp_path: Path) -> None:
    """The other side of the law above."""
    shop.publish(account_of(planned(pair, tmp_path / "work", Character()), pair, source), source, "artifact")
    weights = tmp_path / "artifact" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert not verify_directory(tmp_path / "artifact", tmp_path / "keys" / PUBLIC_NAME).ok


def test_the_report_holds_no_time_and_no_job(pair: tuple[Path, Path], source: Path, tmp_path: Path) -> None:
    """Nor a path of this machine, nor a word of any reply."""
    account = account_of(planned(pair, tmp_path / "work", Character()), pair, source)
    text = rfc8785.dumps(report_of(account, source)).decode()
    for secret in (JOB, "cpu@here", "2026-11-21", str(tmp_path), str(pair[0]), SECRET):
        assert secret not in text
    report = json.loads(text)
    assert report["adapter"]["digest"] == account.adapter.digest
    assert report["reference"]["aligned"] == account.reference.aligned_digest
    assert report["limits"]
    assert unknown(report, parse(report).model_dump(mode="json")) == []


def test_the_report_says_how_much_of_each_reply_was_read(pair: tuple[Path, Path], source: Path, tmp_path: Path) -> None:
    """The token limit of the policy, and the share of the finalist's replies that it cut off."""
    found = planned(pair, tmp_path / "work", Character())
    assert found.certify_report is not None
    rows = [
        replace(row, finish="length" if row.pack == "core_harmful" else "stop") for row in found.certify_report.rows
    ]
    cut = replace(found, certify_report=replace(found.certify_report, rows=tuple(rows)))
    for plan_, share in ((found, "0%"), (cut, f"{104 / len(rows):.0%}")):
        (limit,) = [one for one in report_of(account_of(plan_, pair, source), source)["limits"] if "tokens" in one]
        assert "first 24 tokens" in limit
        assert f"{share} of the replies" in limit


def test_the_report_says_how_well_the_judge_sees(pair: tuple[Path, Path], source: Path, tmp_path: Path) -> None:
    """With lower bounds, in a sentence and in numbers; also in what is signed."""
    account = account_of(planned(pair, tmp_path / "work", Character()), pair, source)
    report = report_of(account, source)
    (limit,) = [one for one in report["limits"] if "Judged by" in one]
    shipped = RulesJudge.info
    for name, share in (
        ("sensitivity", shipped.sensitivity),
        ("refusal recall", shipped.refusal_recall),
        ("specificity", shipped.specificity),
    ):
        assert f"{name} {share.rate:.1%} (at least " in limit
    assert report["certify"]["suite"]["judge"]["refusal_recall"]["hits"] == shipped.refusal_recall.hits
    signed = {one.name: one.measured for one in facts_of(account, {}).after}
    assert signed["judge"]["details"]["refusal_recall"]["n"] == 62


def provenance_of(account: Account) -> dict[str, Any]:
    """The build definition that is signed."""
    statement = statements_for(facts_of(account, {"a": f"sha256:{'0' * 64}"}))[0]
    found: dict[str, Any] = statement.as_dict()["predicate"]["buildDefinition"]
    return found


def test_what_a_method_learned_from_is_among_the_dependencies(
    pair: tuple[Path, Path], source: Path, tmp_path: Path
) -> None:
    """With its digest, beside the packs that measured, and not as one of them; also in the report."""
    found = planned(pair, tmp_path / "work", Character())
    assert found.winner is not None
    learned = replace(found, winner=replace(found.winner, packs=pack_digests(["calibration"])))
    digest = load_pack("calibration").digest
    before, after = (provenance_of(account_of(one, pair, source)) for one in (found, learned))

    wanted = {"name": "pack/calibration", "digest": {"sha256": digest.removeprefix("sha256:")}}
    assert wanted not in before["resolvedDependencies"]
    assert [one for one in after["resolvedDependencies"] if one not in before["resolvedDependencies"]] == [wanted]
    assert before["externalParameters"] == after["externalParameters"]


def test_the_build_type_page_names_what_the_platform_chose(
    pair: tuple[Path, Path], source: Path, tmp_path: Path
) -> None:
    """Exactly these names, in the page's order; each says what was so."""
    page = (Path(__file__).parents[2] / "docs" / "buildtypes" / "adapter-repair-v1.md").read_text()
    section = page.partition("## Internal parameters")[2].partition("##")[0]
    account = account_of(planned(pair, tmp_path / "work", Character()), pair, source)
    chosen = provenance_of(account)["internalParameters"]
    assert list(environment(account)) == re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    assert chosen["seed"] == str(account.plan.policy.suite.seed)
    assert chosen["threads"] == str(torch.get_num_threads())
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    try:
        assert (chosen["deterministic"], provenance_of(account)["internalParameters"]["deterministic"]) == (
            "false",
            "true",
        )
    finally:
        torch.use_deterministic_algorithms(mode=False)


def repair_statement(account: Account) -> dict[str, Any]:
    """The own predicate as it is signed."""
    found: dict[str, Any] = json.loads(statements_for(facts_of(account, {"a": f"sha256:{'0' * 64}"}))[-1].payload)
    return found["predicate"]  # type: ignore[no-any-return] # a predicate is an object


def test_the_choice_is_signed(pair: tuple[Path, Path], source: Path, tmp_path: Path) -> None:
    """The Pareto set with its numbers, the winner, and each loser with the digest of its parameters and the reason."""
    account = account_of(planned(pair, tmp_path / "work", Character()), pair, source)
    report = json.loads(rfc8785.dumps(report_of(account, source)))
    choice = repair_statement(account)["choice"]
    assert choice["pareto"] == report["pareto"] != []
    assert (choice["considered"], choice["told"]) == (2, 2)
    assert report["candidates"][choice["winner"]]["lost"] == ""
    for signed, candidate in zip(choice["candidates"], report["candidates"], strict=True):
        assert signed["parameters"]["sha256"] == hashlib.sha256(rfc8785.dumps(candidate["parameters"])).hexdigest()
        assert (signed["method"], signed["version"]) == (candidate["method"], str(candidate["version"]))
        assert (signed["stage"], signed["energyKept"]) == (candidate["stage"], candidate["energy_kept"])
        assert candidate["lost"].startswith(signed["lost"].removesuffix("\u2026"))
        checks = {one["name"]: one for one in candidate["select"]["checks"]}
        assert signed["attackSuccessUpTo"] == checks["harmful"]["high"]
        assert signed["overRefusal"] == checks["over_refusal"]["rate"]
        assert signed["utilityKept"] == checks["utility"]["rate"]
    assert [bool(one["lost"]) for one in choice["candidates"]] == [place != choice["winner"] for place in range(2)]


def test_what_the_job_itself_took_is_signed(pair: tuple[Path, Path], source: Path, tmp_path: Path) -> None:
    """The report has what the numbers rest on, the statement also what this job put through the model."""
    account = account_of(planned(pair, tmp_path / "work", Character()), pair, source)
    cost = repair_statement(account)["cost"]
    assert cost.pop("spent") == account.plan.cost.in_all
    assert cost == report_of(account, source)["cost"]


@pytest.mark.parametrize("count", [1, 2, 40, MOST + 100])
def test_the_account_of_the_choice_is_bounded(
    count: int, pair: tuple[Path, Path], source: Path, tmp_path: Path
) -> None:
    """However many there were and however much was said of each; the winner and the Pareto set are always told."""
    found = planned(pair, tmp_path / "work", Character())
    assert found.winner is not None
    loser = replace(found.candidates[0], lost="x" * 5000, wish=replace(found.candidates[0].wish, method="m" * 5000))
    crowd = replace(found, candidates=(*[loser] * (count - 1), found.winner), pareto=(count - 1,))
    choice = repair_statement(account_of(crowd, pair, source))["choice"]
    assert (choice["considered"], choice["told"]) == (count, min(count, MOST))
    assert choice["winner"] == choice["candidates"][-1]["place"] == count - 1
    assert len(json.dumps(choice)) < 1000 * min(count, MOST) + 200
    assert SECRET not in json.dumps(choice)


def test_an_upload_released_as_it_was_had_no_choice(pair: tuple[Path, Path], source: Path, tmp_path: Path) -> None:
    """Nothing was considered, and nobody won."""
    account = account_of(planned(pair, tmp_path / "work", Character(obeys_above=2.0)), pair, source)
    assert repair_statement(account)["choice"] == {
        "considered": 0, "told": 0, "winner": None, "pareto": [], "candidates": [],
    }  # fmt: skip


def test_a_changed_choice_no_longer_verifies(shop: Shop, pair: tuple[Path, Path], source: Path, tmp_path: Path) -> None:
    """Another reason in the signed account, everything else as it was."""
    shop.publish(account_of(planned(pair, tmp_path / "work", Character()), pair, source), source, "artifact")
    path = tmp_path / "artifact" / "attestations.jsonl"
    lines = path.read_bytes().splitlines()
    envelope = json.loads(lines[-1])
    payload = base64.b64decode(envelope["payload"])
    changed = payload.replace(b'"lost":"screened out', b'"lost":"screened in.')
    assert changed != payload
    envelope["payload"] = base64.b64encode(changed).decode()
    path.write_bytes(b"".join(line + b"\n" for line in (*lines[:-1], rfc8785.dumps(envelope))))
    report = verify_directory(tmp_path / "artifact", tmp_path / "keys" / PUBLIC_NAME)
    assert not report.ok
    assert "the signature does not fit" in report.attestations[-1].detail


def test_what_leaves_unchanged_is_the_upload(shop: Shop, pair: tuple[Path, Path], source: Path, tmp_path: Path) -> None:
    """Byte for byte."""
    found = planned(pair, tmp_path / "work", Character(obeys_above=2.0))
    result = shop.publish(account_of(found, pair, source), source, "artifact")

    assert result.verdict is Verdict.RELEASED_UNCHANGED
    core = shop.core("artifact")
    assert {name: core[name] for name in file_digests(source)} == {
        path.name: path.read_bytes() for path in source.iterdir()
    }


def test_what_is_quarantined_has_a_report_and_nothing_else(
    shop: Shop, pair: tuple[Path, Path], source: Path, tmp_path: Path
) -> None:
    """No artifact, no statement, no file that could be taken for safe."""
    found = planned(pair, tmp_path / "work", Character(obeys_above=0.1))
    result = shop.publish(account_of(found, pair, source), source, "artifact")

    assert (result.verdict, result.artifact, result.statements) == (Verdict.QUARANTINED, None, ())
    assert not (tmp_path / "artifact").exists()
    assert result.report_digest is not None
    assert json.loads(shop.blobs.read(result.report_digest))["verdict"] == "quarantined"
    assert len([path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]) == 1


def test_a_repair_without_its_files_is_never_released(pair: tuple[Path, Path], source: Path, tmp_path: Path) -> None:
    """The upload must not leave under the name of its repair."""
    found = planned(pair, tmp_path / "work", Character())
    assert found.winner is not None
    for winner in (None, replace(found.winner, directory=None)):
        account = account_of(replace(found, winner=winner), pair, source)
        with pytest.raises(RuntimeError, match="without the files"):
            assemble(account, b"{}", source=source, folder=tmp_path / "artifact")
        assert not (tmp_path / "artifact").exists()


LEAVES = st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.integers(-(2**53) + 1, 2**53 - 1)
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner), max_leaves=8)


@given(tree=TREES)
def test_what_is_plain_has_a_canonical_form(tree: Any) -> None:
    """Whatever was measured; read as doubles, which is what numbers in JSON are, it is written again the same."""
    text = rfc8785.dumps(plain(tree))
    assert rfc8785.dumps(json.loads(text, parse_int=float)) == text


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_was_not_measured(number: float) -> None:
    """Null, at any depth; tuples become lists."""
    assert plain({"a": [number, {"b": (number, 1.5)}]}) == {"a": [None, {"b": [None, 1.5]}]}
