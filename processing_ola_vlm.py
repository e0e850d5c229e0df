"""Processor of OLA-VLM: LLaVA's, with the task tokens after each image's placeholders (paper, figure 4)."""

from operator import itemgetter

from transformers import LlavaProcessor, PreTrainedConfig


def added_ids(tokenizer, before: dict[str, int]) -> list[int]:
    """
    Ids of the tokens that `tokenizer` has beyond those of `before` (its `get_vocab()` of then), in order.

    Their number says nothing about ids: a tokenizer may have holes in them. Then the library may also give a new token
    the id of another one, which is a ValueError.
    """
    owners = {token_id: token for token, token_id in before.items()}
    ids = []
    # A vocabulary's own order is not that of its ids.
    for token, token_id in sorted(tokenizer.get_vocab().items(), key=itemgetter(1)):
        if token in before:
            continue
        # A new token that took another one's id would share its embedding.
        if token_id in owners:
            holes = f"{len(before)} tokens with ids up to {max(owners)}"
            what = f"the tokenizer, of {holes}, gives {token} the id {token_id} of {owners[token_id]!r}"
            raise ValueError(f"{what}: add its tokens of the largest ids with add_tokens first, or close the holes")
        ids.append(token_id)
    return ids


class OlaVlmProcessor(LlavaProcessor):
    """
    Expands each `<image>` of the text into the image's placeholders and then `task_tokens`.

    `task_tokens`: vocabulary entries of the tokenizer, in sequence order (`task_token_strings(config.tasks)`); the
    other arguments are LLaVA's. Every argument is named, since a processor saves only the named ones.
    Raises ValueError if the tokenizer lacks one of the tokens.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        num_additional_image_tokens=0,
        task_tokens=None,
        **kwargs,
    ):
        assert tokenizer is not None
        for name, tokens in [("image_token", [image_token]), ("task_tokens", task_tokens or [])]:
            if not isinstance(tokens, (list, tuple)) or not all(isinstance(token, str) for token in tokens):
                raise ValueError(f"{name} is {tokens!r}: give the names of tokens.")
        self.task_tokens = list(task_tokens or [])
        # Said here: `convert_tokens_to_ids` would give the unknown token's id, or None.
        missing = [token for token in [image_token, *self.task_tokens] if token not in tokenizer.get_vocab()]
        if missing:
            raise ValueError(f"The tokenizer lacks {missing}: add them as special tokens, as build_ola_vlm does.")
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """ProcessorMixin's. The class is at hand, so nobody is asked whether to run the folder's own code."""
        kwargs.setdefault("trust_remote_code", False)
        # With the flag the library is left to itself, as with any other processor.
        if not kwargs["trust_remote_code"]:
            fields, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
            # AutoTokenizer doesn't know our model type and would try config.json by an empty class, with a warning.
            if fields.get("model_type") == "ola_vlm":
                kwargs.setdefault("config", PreTrainedConfig())
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def task_token_ids(self) -> list[int]:
        """Ids of the task tokens in sequence order: equal to the model's `config.task_token_ids`."""
        return self.tokenizer.convert_tokens_to_ids(self.task_tokens)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The text that stands for one image: its placeholders, then the task tokens."""
        # Behind the placeholders, so that under the causal mask task tokens attend to the image.
        return super().replace_image_token(image_inputs, image_idx, **kwargs) + "".join(self.task_tokens)


OlaVlmProcessor.register_for_auto_class()
