"""Configuration of the multi-encoder LLaVA, the paper's baselines (arXiv 2412.09585, section 4 and Table 1)."""

from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig

FUSIONS = ("feature", "token")
FEATURES = ("embedding", "mean", "last")


def _check(condition: bool, field: str, value, remedy: str):
    if not condition:
        raise ValueError(f"{field} is {value!r}: {remedy}.")


@strict
class MultiEncoderLlavaConfig(LlavaConfig):
    """
    LLaVA's, and which encoders stand beside the base encoder and how their features are joined to its own.

    `fusion`: "feature" joins the channels at every position of the base grid, "token" appends tokens to it.
    `encoders`: in order, dicts of `name`; `config`, a vision backbone's or a CLIP vision tower's; `size`, side in
    pixels of what it sees; `features`, which of its outputs: a CLIP tower's "embedding", the "mean" of a backbone's
    feature maps or the "last" of them; `dim`, their width.
    `num_encoder_tokens`: tokens of each encoder if `fusion` is "token".
    `vocab_padding`: how many of the vocabulary's last rows stand for no token, and are never emitted.
    `image_seq_length` is the base grid's length, without those tokens. Raises ValueError that names the field.
    """

    model_type = "multi_encoder_llava"
    # Trainer's evaluation needs a list here.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "cache",
        "hidden_states",
        "attentions",
        "image_hidden_states",
        "image_outputs",
    ]
    # Training asks for them: nothing is distilled, and the encoders' tokens are image tokens.
    tasks: ClassVar[tuple] = ()
    task_token_ids: ClassVar[tuple] = ()

    fusion: str = "feature"
    encoders: list | None = None  # pyright: ignore[reportRedeclaration] (the field, typed below as it is read)
    num_encoder_tokens: int = 8
    vocab_padding: int = 0

    # What `__post_init__` leaves: configurations and a list, never dicts or None.
    if TYPE_CHECKING:
        text_config: Any = None
        vision_config: Any = None
        encoders: Any = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.encoders = list(self.encoders or [])
        _check(self.fusion in FUSIONS, "fusion", self.fusion, f"choose one of {FUSIONS}")
        _check(self.num_encoder_tokens > 0, "num_encoder_tokens", self.num_encoder_tokens, "give at least 1")
        # Encoders' feature maps are resized to the base grid, which therefore has to be a square.
        grid = round(self.image_seq_length**0.5)
        _check(grid**2 == self.image_seq_length, "image_seq_length", self.image_seq_length, "give a square grid's")
        fields = {"name", "config", "size", "features", "dim"}
        for encoder in self.encoders:
            _check(set(encoder) == fields, "encoders[]", sorted(encoder), f"give each {sorted(fields)}")
            known = encoder["features"] in FEATURES
            _check(known, f"encoders[{encoder['name']}].features", encoder["features"], f"choose one of {FEATURES}")
        # One class can register for one Auto class only; both names lead to the same model.
        auto_map = dict(self.__dict__.get("auto_map") or {})
        for name in ("AutoModel", "AutoModelForMultimodalLM"):
            auto_map.setdefault(name, "modeling_multi_encoder.MultiEncoderLlavaForConditionalGeneration")
        self.auto_map = auto_map

    @property
    def num_image_tokens(self) -> int:
        """Of an image in the LLM."""
        # "feature" widens tokens and adds none.
        appended = len(self.encoders) * self.num_encoder_tokens if self.fusion == "token" else 0
        return self.image_seq_length + appended


MultiEncoderLlavaConfig.register_for_auto_class()
