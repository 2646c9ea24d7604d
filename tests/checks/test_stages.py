"""How far each candidate came, and what its weights alone told: the account in the report, which decides nothing."""

from pathlib import Path
from typing import Any

import pytest

from repair.basis import BasisIdentity, BasisPack, BasisSettings
from repair.basis_writer import write_basis
from repair.checkpoint import Checkpoint
from repair.checks.planner import Plan, Reference, plan
from repair.checks.policy import Candidate
from repair.checks.verdict import Stage
from repair.checks.weights_only import weights_only
from repair.context import RepairContext
from repair.first_order import adapter_damage
from repair.lora import LoraAdapter
from repair.measure_basis import left_out, measured_linears
from tests import tiny
from tests.checks.acting import CERTIFY, SAMPLES, UPLOAD, Character, chat_of, policy_of, strength
from tests.repair import dense


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny.tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def basis(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> BasisPack:
    settings = BasisSettings(rank=8)
    aligned, base = map(Checkpoint.open, pair)
    context = RepairContext(aligned=aligned, base=base)
    identity = BasisIdentity(aligned="sha256:a", base="sha256:b", settings=settings)
    where = identity.folder(tmp_path_factory.mktemp("packs"))
    write_basis(identity, measured_linears(context, settings), where, left_out=left_out(context), about={})
    return BasisPack.open(where, aligned="sha256:a", base="sha256:b", tolerance=0.01)


def run(pair: tuple[Path, Path], work: Path, chat: Any, wishes: list[Candidate], **known: Any) -> Plan:
    aligned, base = map(Checkpoint.open, pair)
    reference = Reference(aligned=aligned, base=base, chat=chat, digest="sha256:feed", **known)
    policy = policy_of(strength=[0.85])
    return plan(UPLOAD, reference=reference, policy=policy, work_dir=work, samples=SAMPLES, candidates=wishes)


def scaled(by: float) -> Candidate:
    return Candidate(method="scale", parameters={"strength": by})


def test_every_candidate_says_how_far_it_came(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """From what changes nothing to what was certified; the reason tells why it went no further."""
    chat = chat_of(Character())
    seen = {0.0: 5.0, 1.0: -5.0, 0.99: -5.0}
    chat.margins = lambda _prompt, on: seen.get(round(strength(on), 2), 4.0)
    wishes = [
        scaled(1.0),
        scaled(0.99),
        scaled(0.5),
        scaled(0.95),
        scaled(0.85),
        Candidate(method="scale", parameters={"strength": 0.85, "modules": "model.*"}),
    ]
    found = run(pair, tmp_path, chat, wishes)
    stages = [(one.stage, one.lost.partition(":")[0]) for one in found.candidates]
    assert stages == [
        (Stage.WEIGHTS, "changes nothing, and the upload itself did not meet the policy"),
        (Stage.PROXY, "screened out"),
        (Stage.UTILITY, "screened out"),
        (Stage.RACE, "screened out"),
        (Stage.CERTIFY, ""),
        (Stage.WEIGHTS, 'the same bytes as scale {"modules"'),
    ]
    assert found.winner is found.candidates[4]
    assert [one["stage"] for one in found.as_dict()["candidates"]] == [stage.value for stage, _ in stages]
    assert all(one.weights is not None for one in found.candidates)


def test_one_that_failed_its_certificate_came_that_far(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """And one that was passed over came nowhere."""

    class Lucky(Character):
        def says(self, prompt: str, on: Any) -> str:
            self.obeys_above = 0.1 if prompt in CERTIFY else 0.9
            return super().says(prompt, on)

    aligned, base = map(Checkpoint.open, pair)
    reference = Reference(aligned=aligned, base=base, chat=chat_of(Lucky()), digest="sha256:feed")
    policy = policy_of()
    document = policy.model_dump(mode="json")
    document["trials"] = [{"method": "scale", "grid": {"strength": [0.95, 0.9, 0.85, 0.8, 0.75]}, "ordered": True}]
    found = plan(
        UPLOAD,
        reference=reference,
        policy=type(policy).model_validate(document),
        work_dir=tmp_path,
        samples=SAMPLES,
    )
    stages = {one.parameters["strength"]: one.stage for one in found.candidates}
    looked = [one for one in found.candidates if one.lost.startswith("not certified")]
    assert [one.stage for one in looked] == [Stage.CERTIFY]
    assert stages[0.75] is Stage.PASSED_OVER


def test_the_cosine_is_that_of_the_dense_definition(pair: tuple[Path, Path], basis: BasisPack) -> None:
    """Mean over modules of the candidate's own update, next to one without preference."""
    found = weights_only(UPLOAD, basis, None)
    wanted = []
    for layer in UPLOAD.layers:
        operator = dense.published_operator(dense.displacement(*pair, layer.name))
        wanted.append(dense.cosine(operator @ dense.delta(layer), dense.delta(layer)))
    assert found.rho_modules == len(UPLOAD.layers)
    assert found.rho == pytest.approx(sum(wanted) / len(wanted), rel=2e-2)
    assert found.rho_null is not None
    assert 0 < found.rho_null < 1
    halved = weights_only(UPLOAD.scaled(0.5), basis, None)
    assert halved.rho == pytest.approx(found.rho, rel=1e-6)
    assert [one for one in found.not_measured if "reference prepare" in one and "calibration" in one]


def test_damage_is_the_sum_over_the_modules(tmp_path: Path) -> None:
    """As the racing order uses it; without a pack the command that makes one is told."""
    calibration = tiny.calibration(tmp_path / "pack")
    known = weights_only(UPLOAD, None, calibration)
    assert known.damage == adapter_damage(UPLOAD, calibration) != 0
    assert [one for one in known.not_measured if one.startswith("rho") and "reference prepare" in one]
    bare = weights_only(UPLOAD, None, None)
    assert (bare.rho, bare.damage, len(bare.not_measured)) == (None, None, 2)


def test_a_pack_that_does_not_fit_is_told_and_stops_nothing(basis: BasisPack) -> None:
    """The numbers decide nothing, so they may not end a job either."""
    name = UPLOAD.layers[0].name
    wide = LoraAdapter(layers=(tiny.layer(name, (999, 53)),))
    found = weights_only(wide, basis, None)
    assert found.rho is None
    assert name in found.not_measured[0]


def test_packs_change_the_account_and_not_the_choice(pair: tuple[Path, Path], basis: BasisPack, tmp_path: Path) -> None:
    """With and without them: the same stages, reasons, numbers and winner."""
    wishes = [scaled(0.95), scaled(0.85), scaled(0.5)]
    bare, told = (
        run(pair, tmp_path / str(at), chat_of(Character()), wishes, **known)
        for at, known in enumerate(({}, {"basis": basis}))
    )
    assert all(one.weights is not None and one.weights.rho is not None for one in told.candidates)
    assert all(one.weights is not None and one.weights.rho is None for one in bare.candidates)
    plain = [{k: v for k, v in one.items() if k != "weights"} for one in bare.as_dict()["candidates"]]
    assert plain == [{k: v for k, v in one.items() if k != "weights"} for one in told.as_dict()["candidates"]]
