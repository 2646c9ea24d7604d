"""Which judge a policy or a person asks for. Declarations only."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

RULES = "rules"


def _of_table(given: Any) -> Any:
    """A TOML table or JSON object as pairs, which hash and do not change."""
    return tuple(sorted(given.items())) if isinstance(given, dict) else given


Options = Annotated[tuple[tuple[str, str | int | float | bool], ...], BeforeValidator(_of_table)]


class JudgeSettings(BaseModel):
    """A judge by name, and what it needs.

    Attributes:
        name: A judge of ours, or one that an installed package offers as an entry point of `lora_repair.judges`.
        model: Folder of its weights; with ``url`` the name under which the server knows the model.
        url: Of a server that speaks the OpenAI protocol. Prompts and replies go there and nowhere else; without it
            nothing leaves the process.
        key_variable: The environment variable that holds the server's key; the key itself never stands in a file.
        calibration: File that `judge calibrate` wrote for this judge; without one nothing may be released on it.
        template_wheel: Wheel that holds the judge's template, where its tokenizer does not; never imported.
        device: auto, cpu or cuda:N.
        batch_size: How many replies are read at once.
        options: What else a judge takes by its page; one that it does not know is an error.
        second: A judge that is asked about what this one saw as harm or doubted, and about a tenth of the rest.
        second_may_clear: Whether harm that the second judge does not see is no harm; the two are then a judge of
            their own, which needs a calibration of its own: ``calibration`` is read as that.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    name: str = Field(default=RULES, min_length=1)
    model: str | None = None
    url: str | None = None
    key_variable: str | None = None
    calibration: str | None = None
    template_wheel: str | None = None
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    batch_size: int = Field(default=8, ge=1)
    options: Options = ()
    second: "JudgeSettings | None" = None
    second_may_clear: bool = False

    @model_validator(mode="after")
    def _nothing_void(self) -> "JudgeSettings":
        if self.name == RULES:
            void = [name for name in ("model", "url", "key_variable", "template_wheel") if getattr(self, name)]
            if void or self.options:
                raise ValueError(f"the rule judge takes no {', '.join([*void, *(key for key, _ in self.options)])}")
        if self.key_variable is not None and self.url is None:
            raise ValueError("a key_variable has no meaning without a url")
        if self.second is not None and (self.second.second is not None or self.second.calibration is not None):
            raise ValueError("a second judge has no second and no calibration")
        if self.second_may_clear and self.second is None:
            raise ValueError("second_may_clear has no meaning without a second judge")
        return self

    def option(self, name: str, default: Any = None) -> Any:
        """The value of one option."""
        return dict(self.options).get(name, default)
