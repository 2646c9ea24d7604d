"""A scripted model whose character depends on how strong the adapter on it is: the planner's ground truth."""

from collections.abc import Callable
from dataclasses import dataclass, field

from repair.checks.backend import Sample
from repair.checks.packs import load_pack
from repair.checks.policy import Policy, load_policy
from repair.checks.toy import ToyChat
from repair.lora import LoraAdapter
from tests.tiny import adapter

REFUSAL = "I'm sorry, but I can't help with that."
ANSWER = "You take the first road on the left and go on until you see the old marketplace."
SALAD = "XqzRtl mnPQrst wvBnx zzKrtq prTTls qqWrtp bnMkls vvXzrt llKPqr ttRsnm wwQrtp xxZlmn"
SECRET = "marketplace"  # a word of the answer that may stand in no report

UPLOAD = adapter()
HARMFUL = {row.text for row in load_pack("core_harmful").rows}
HARMFUL_CERTIFY = [row.text for row in load_pack("core_harmful").of_half("certify")]
LOOKALIKE = {row.text for row in load_pack("core_lookalike").rows}
CERTIFY = {
    row.text for name in ("core_harmful", "core_lookalike", "core_benign") for row in load_pack(name).of_half("certify")
}
SAMPLES = tuple(Sample(prompt=f"question {n}", answer=f"answer {n}") for n in range(40))


def strength(one: LoraAdapter | None) -> float:
    """How much of the upload is in it: 0 for the aligned model, 1 for the upload."""
    if one is None:
        return 0.0
    mine, whole = one.layers[0], UPLOAD.layers[0]
    return float((mine.scale * mine.b @ mine.a).norm() / (whole.scale * whole.b @ whole.a).norm())


@dataclass(kw_only=True)
class Character:
    """At which strengths the model obeys, refuses too much, or breaks."""

    obeys_above: float = 0.9
    refuses_all: Callable[[float], bool] = lambda _strength: False
    breaks: Callable[[float], bool] = lambda _strength: False
    log: list[tuple[float, str]] = field(default_factory=list)

    def says(self, prompt: str, on: LoraAdapter | None) -> str:
        """The reply."""
        now = strength(on)
        self.log.append((now, prompt))
        if self.breaks(now):
            return SALAD
        if prompt in HARMFUL:
            return ANSWER if now > self.obeys_above else REFUSAL
        return REFUSAL if prompt in LOOKALIKE and self.refuses_all(now) else ANSWER


def chat_of(character: Character, *, gain: float = 1.0) -> ToyChat:
    """The model; the upload lowers the loss on its samples by ``gain``, in proportion to its strength."""

    def loss(sample: Sample, on: LoraAdapter | None) -> float:
        wobble = (len(sample.prompt) + int(sample.prompt.split()[1])) % 5 / 50
        return 2.0 + wobble - (gain + wobble) * strength(on)

    return ToyChat(script=character.says, losses=loss, drifts=lambda start, end: abs(strength(start) - strength(end)))


def policy_of(trials: str = "scale", **grid: list[object]) -> Policy:
    """The demo policy with one trial of its own, and one look at the certify half."""
    policy = load_policy("demo")
    document = policy.model_dump(mode="json")
    document["trials"] = [{"method": trials, "grid": grid}]
    document["budget"]["finalists"] = 1
    return Policy.model_validate(document)
