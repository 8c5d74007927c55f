"""Configuration of Mono-InternVL: one decoder that sees and writes, described on one screen.

`text_config`    the decoder: InternLM2's dimensions, RoPE, and whether attention has visual experts too (1.5)
`vision_config`  the visual embedding: 14-px patches -> one visual token per 28 x 28 px (arXiv 2410.08202, 3.1)
`image_token_id` the placeholder in `input_ids` that stands for one visual token

Every value is checked here, once; nothing downstream checks again. The official Hub layout (`model_type:
internvl_chat` with an `llm_config`) is understood on the way in; what this model does not know in it is ignored.
"""

from typing import TYPE_CHECKING, Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .configuration_checks_mono_internvl import (
    BIASED_PROJECTIONS,
    check_choice,
    check_numbers,
    check_queries,
    check_rope,
    fields_of,
    warn_of_misspelt,
    without_unused,
)


if TYPE_CHECKING:
    # Remote code is kept in memory under a hash of a file and of those it names. Two versions of the model must not
    # share one configuration class, by which transformers finds the model's class; so this names all the others.
    from .modeling_mono_internvl import MonoInternVLForCausalLM  # noqa: F401
    from .processing_mono_internvl import MonoInternVLProcessor  # noqa: F401


logger = logging.get_logger(__name__)

VISUAL_ATTENTION_EXPERTS = ("none", "qkv", "qkvo")
# How routed experts are computed, see `experts_mono_internvl.py`.
EXPERT_KERNELS = ("auto", "plain", "fused")
# Where remote code finds each class; `AutoModel` is the model that chats.
AUTO_MAP = {
    "AutoConfig": "configuration_mono_internvl.MonoInternVLConfig",
    "AutoModel": "modeling_mono_internvl.MonoInternVLForCausalLM",
    "AutoModelForCausalLM": "modeling_mono_internvl.MonoInternVLForCausalLM",
    "AutoModelForImageTextToText": "modeling_mono_internvl.MonoInternVLForCausalLM",
    "AutoModelForMultimodalLM": "modeling_mono_internvl.MonoInternVLForCausalLM",
    "AutoProcessor": "processing_mono_internvl.MonoInternVLProcessor",
    "AutoImageProcessor": "image_processing_mono_internvl.MonoInternVLImageProcessor",
}
# InternLM2's vocabulary as Mono-InternVL grew it: where the other control tokens stand, seen from `<IMG_CONTEXT>`, and
# that one seen from the end. Other tokenizers have them elsewhere: the ids are fields, these only their defaults.
_IMAGE_START, _IMAGE_END, _STOPS, _IMAGE_TOKEN_FROM_END = -2, -1, (-4, -3), 7
# One visual token covers 2 x 2 of the 14-px patches of the released model.
PATCHES_PER_TOKEN_SIDE = 2


# Truth values that are written only where they are True.
_SWITCHES = ("mlp_bias", "qk_norm", "expert_gates")

# What the released configuration had -> where it is here.
_RELEASED_NAMES = {
    "llm_config": "text_config",
    "force_image_size": "vision_config.image_size",
    "num_image_token": "vision_config.tokens_per_tile",
    "max_dynamic_patch": "max_tiles of the image processor",
    "min_dynamic_patch": "min_tiles of the image processor",
    "dynamic_image_size": "max_tiles=1 of the image processor for its False",
    "use_thumbnail": "use_thumbnail of the image processor",
    "template": "the processor's chat_template",
}


# Follow `image_token_id` where they are not given.
_CONTROL_IDS = ("image_start_token_id", "image_end_token_id", "stop_token_ids")
# Of learnable queries; written only where there are some.
_OF_QUERIES = ("num_learnable_queries", "query_grids", "query_placement", "query_token_id")
_OVERRIDES = ("image_token_id", *_CONTROL_IDS, "visual_attention_experts", "tie_word_embeddings", *_OF_QUERIES)
# Of the decoder alone; others of its fields are set on the whole configuration too, by transformers' trainers.
_TEXT_DIMENSIONS = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
        *("num_key_value_heads", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
        *("rms_norm_eps", "hidden_act", "drop_path_rate", "attention_bias", "mlp_bias", "qk_norm"),
    }
)


class MonoInternVLVisionConfig(PreTrainedConfig):
    """The visual embedding.

    Args:
        hidden_size: channels of one small patch before four of them become one visual token.
        patch_size: side of a small patch in pixels; a visual token covers twice that (28 px).
        image_size: side of a square tile in pixels, a multiple of `2 * patch_size`; the size of the position table.
        image_mean, image_std: per channel, of pixels in 0..1; applied in `forward` to uint8 pixels only.
    """

    model_type = "mono_internvl_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    patch_size: int = 14
    image_size: int = 448
    num_channels: int = 3
    initializer_range: float = 0.02
    image_mean: list[float] | tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: list[float] | tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self, **kwargs: Any):
        warn_of_misspelt("vision_config", self, kwargs)
        check_numbers("vision_config", self, ("hidden_size", "patch_size", "image_size"))
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or [isinstance(v, (int, float)) for v in value] != [True] * 3:
                raise ValueError(f"vision_config: {name}={value!r} must be three numbers")
        if not min(self.image_std) > 0:
            raise ValueError(f"vision_config: image_std={self.image_std!r} must be positive")
        token_side = PATCHES_PER_TOKEN_SIDE * self.patch_size
        if self.num_channels != 3:
            raise ValueError(f"vision_config: num_channels={self.num_channels!r} must be 3")
        if self.image_size < token_side or self.image_size % token_side:
            raise ValueError(f"vision_config: image_size={self.image_size} must be a positive multiple of {token_side}")
        self.image_mean, self.image_std = list(self.image_mean), list(self.image_std)
        super().__post_init__(**kwargs)

    @property
    def token_size(self) -> int:
        """Side in pixels of the square that one visual token covers."""
        return PATCHES_PER_TOKEN_SIDE * self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile of `image_size`."""
        return (self.image_size // self.token_size) ** 2


class MonoInternVLTextConfig(PreTrainedConfig):
    """The decoder: InternLM2's shape (arXiv 2403.17297), or that of another base, with a second feed-forward expert per
    layer.

    Args:
        attention_bias: which attention projections have a bias: False, True (all four), `qkv` (Qwen2) or `o`.
        mlp_bias: whether the projections of the feed-forward experts have one.
        qk_norm: whether each head's queries and keys are normalised before they are rotated (Qwen3).
        visual_attention_experts: which attention projections visual tokens have of their own (Mono-InternVL-1.5):
            `none` (v1), `qkv` or `qkvo`.
        expert_kernel: how routed experts are computed: `plain`; `fused`, by a Triton kernel wherever it can run; or
            `auto`, by the kernel where it is faster (`experts_mono_internvl.py`). May be changed on a loaded model.
        expert_gates: the output of each feed-forward expert is scaled by sigmoid(w x) of its input x (BREEN, arXiv
            2503.12446).
        drop_path_rate: stochastic depth of the residual branches while training, growing linearly with depth.
        rope_parameters: `{"rope_type", "rope_theta"}` and what the type needs (`check_rope`); older files'
            `rope_theta` and `rope_scaling` are folded into it.
    """

    model_type = "mono_internvl_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    default_theta = 1_000_000.0
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
        "layers.*.visual_mlp.gate_proj": "colwise",
        "layers.*.visual_mlp.up_proj": "colwise",
        "layers.*.visual_mlp.down_proj": "rowwise",
    }

    vocab_size: int = 92553
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    # Given as None, they are filled in; `Any` because they are int from then on.
    num_key_value_heads: Any = 8
    head_dim: Any = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = 2
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: Any = None
    # bool or str.
    attention_bias: Any = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.0
    visual_attention_experts: str = "none"
    expert_gates: bool = False
    expert_kernel: str = "auto"

    def __post_init__(self, **kwargs: Any):
        # InternLM2's own name for it; a pinned attention backend would overrule the caller's.
        self.attention_bias = kwargs.pop("bias", self.attention_bias) or False
        kwargs.pop("attn_implementation", None)
        warn_of_misspelt(
            "text_config", self, [name for name in kwargs if name not in ("rope_scaling", "rope_theta", "bias")]
        )
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        check_numbers("text_config", self, (*sizes, "max_position_embeddings"))
        check_numbers("text_config", self, ("rms_norm_eps", "initializer_range"), (int, float))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.hidden_size % self.num_attention_heads and self.head_dim is None:
            raise ValueError(
                f"text_config: hidden_size={self.hidden_size} must be a multiple of "
                f"num_attention_heads={self.num_attention_heads}, or head_dim must be given"
            )
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        check_numbers("text_config", self, ("num_key_value_heads", "head_dim"))
        if self.head_dim % 2:
            raise ValueError(f"text_config: head_dim={self.head_dim} must be even, rotations turn pairs")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"text_config: num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        check_choice("", self, "visual_attention_experts", VISUAL_ATTENTION_EXPERTS)
        check_choice("text_config: ", self, "expert_kernel", EXPERT_KERNELS)
        check_choice("text_config: ", self, "attention_bias", BIASED_PROJECTIONS)
        for name in _SWITCHES:
            check_choice("text_config: ", self, name, (False, True))
        for name in ("drop_path_rate", "attention_dropout"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
                raise ValueError(f"text_config: {name}={value!r} must be in [0, 1)")
        for name, value in (("rope_parameters", self.rope_parameters), ("rope_scaling", kwargs.get("rope_scaling"))):
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"text_config: {name} must be a dict, not {value!r}")
        pad = self.pad_token_id
        if pad is not None and not (isinstance(pad, int) and 0 <= pad < self.vocab_size):
            # -1 would be the last row.
            logger.warning(f"text_config: pad_token_id={pad!r} is no id of {self.vocab_size}; it is left out")
            self.pad_token_id = None
        super().__post_init__(**kwargs)
        # Old files fill what they do not use with null.
        rope = self.rope_parameters = dict(self.rope_parameters or {})
        rope["rope_type"] = check_rope(rope)
        if rope.get("rope_theta") is None:
            rope["rope_theta"] = self.default_theta
        if not isinstance(rope["rope_theta"], (int, float)) or not rope["rope_theta"] > 0:
            raise ValueError(f"text_config: rope_theta={rope['rope_theta']!r} must be a positive number")
        self.plan_visual_attention()

    @property
    def biased_projections(self) -> str:
        """The letters of the attention projections that have a bias."""
        return BIASED_PROJECTIONS[self.attention_bias]

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        for name in _SWITCHES:
            values = without_unused(values, name, (name,))
        return values

    def plan_visual_attention(self) -> None:
        """Tensor-parallel rules for the visual projections and the norms of heads that there are; transformers warns of
        those without a match."""
        parts = "" if self.visual_attention_experts == "none" else self.visual_attention_experts
        rules = {f"layers.*.self_attn.visual_{x}_proj": "rowwise" if x == "o" else "colwise" for x in parts}
        norms = [f"{kind}{x}_norm" for kind in ("", "visual_" if parts else "") for x in "qk"] if self.qk_norm else []
        rules |= {f"layers.*.self_attn.{name}": "replicated_with_grad_allreduce" for name in norms}
        self.base_model_tp_plan = {**self.base_model_tp_plan, **rules}  # type: ignore[misc]


def _only_fields(values: dict[str, Any], config_class: type[PreTrainedConfig], extra: tuple[str, ...] = ()) -> dict:
    """The entries of an official sub-config that `config_class` (or `extra`) knows."""
    known = fields_of(config_class)
    return {name: value for name, value in values.items() if name in known or name in extra}


class MonoInternVLConfig(PreTrainedConfig):
    """Mono-InternVL: `text_config` and `vision_config` (dicts or objects) and what joins them.

    Args:
        image_token_id: the id of `<IMG_CONTEXT>` in `input_ids`.
        image_start_token_id, image_end_token_id: of `<img>` and `</img>`, never generated, as `<IMG_CONTEXT>` is not.
        stop_token_ids: of `<|im_end|>` and `<|im_start|>`, which end an answer, as `text_config.eos_token_id` does.
            These three are where InternLM2's vocabulary has them if they are not given, and follow `image_token_id`
            when that is set.
        visual_attention_experts: see `MonoInternVLTextConfig`, where it is kept; may be given here or there.
        num_learnable_queries: queries of a block (BREEN, arXiv 2503.12446; there 100); 0: the model has none.
        query_grids: sides of the square grids that they make, the finest first; default [8, 6] for 100, else one grid.
        query_placement: where a block stands: `image`, behind each picture; or `question`, behind the message that
            holds pictures, whose words are then repeated.
        query_token_id: the placeholder in `input_ids` that stands for one query.

    Raises:
        ValueError: naming the value and what is allowed.
    """

    model_type = "mono_internvl"
    sub_configs = {"text_config": MonoInternVLTextConfig, "vision_config": MonoInternVLVisionConfig}
    # What `Trainer.evaluate` leaves out of the predictions that `compute_metrics` sees.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_hidden_states", "image_outputs"]

    # dict, object or None; an object after `__post_init__`.
    text_config: Any = None
    vision_config: Any = None
    image_token_id: int = 92546
    # Given as None, they are filled in.
    image_start_token_id: Any = None
    image_end_token_id: Any = None
    stop_token_ids: Any = None
    visual_attention_experts: str | None = None
    num_learnable_queries: int = 0
    query_grids: Any = None
    query_placement: str = "image"
    query_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any):
        # An official file's `model_type` would hide the class attribute; its `auto_map` names code that is not ours.
        kwargs.pop("model_type", None)
        self.auto_map = dict(AUTO_MAP)
        kwargs.pop("auto_map", None)
        if "llm_config" in kwargs:
            kwargs = self._read_official(kwargs)
        warn_of_misspelt("config", self, kwargs)
        for name in _TEXT_DIMENSIONS.intersection(kwargs):
            logger.warning(f"config: {name} changes nothing here; it belongs into text_config")

        for name, config_class in self.sub_configs.items():
            value = getattr(self, name)
            if value is None:
                setattr(self, name, config_class())
            elif isinstance(value, dict):
                setattr(self, name, config_class(**{key: v for key, v in value.items() if key != "model_type"}))
            elif not isinstance(value, PreTrainedConfig):
                raise ValueError(f"{name} must be a dict or a {config_class.__name__}, not {type(value).__name__}")

        text_choice = self.text_config.visual_attention_experts
        if self.visual_attention_experts is None:
            self.visual_attention_experts = text_choice
        check_choice("", self, "visual_attention_experts", VISUAL_ATTENTION_EXPERTS)
        if text_choice not in ("none", self.visual_attention_experts):
            raise ValueError(
                f"visual_attention_experts={self.visual_attention_experts!r} contradicts "
                f"text_config.visual_attention_experts={text_choice!r}"
            )
        self.text_config.visual_attention_experts = self.visual_attention_experts
        self.text_config.plan_visual_attention()

        if self.tie_word_embeddings or self.text_config.tie_word_embeddings:
            self.tie_word_embeddings = self.text_config.tie_word_embeddings = True
        self._check_control_ids()
        self.query_grids = check_queries(self)
        super().__post_init__(**kwargs)

    def _check_control_ids(self) -> None:
        if not isinstance(self.image_token_id, int) or self.image_token_id < 0:
            raise ValueError(f"image_token_id={self.image_token_id!r} must be an integer that is not negative")
        given = {name: getattr(self, name) for name in _CONTROL_IDS}
        self.image_token_id = self.image_token_id  # fills in those that are not given
        for name, value in given.items():
            if value is None:
                continue
            ids = value if name == "stop_token_ids" and isinstance(value, (list, tuple)) else [value]
            if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
                kind = "integers that are" if name == "stop_token_ids" else "an integer that is"
                raise ValueError(f"{name}={value!r} must be {kind} not negative")
            setattr(self, name, list(ids) if name == "stop_token_ids" else value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # A field that a file or a caller gives is assigned after this one, and stays.
        if name == "image_token_id" and isinstance(value, int):
            self.image_start_token_id = value + _IMAGE_START if value + _IMAGE_START >= 0 else None
            self.image_end_token_id = value + _IMAGE_END if value + _IMAGE_END >= 0 else None
            self.stop_token_ids = [value + stop for stop in _STOPS if value + stop >= 0]

    def to_dict(self) -> dict[str, Any]:
        return without_unused(super().to_dict(), _OF_QUERIES[0], _OF_QUERIES)

    @property
    def image_token_ids(self) -> list[int]:
        """Ids of `<IMG_CONTEXT>`, `<img>`, `</img>` and of a query, which are read and never generated."""
        ids = (self.image_token_id, self.image_start_token_id, self.image_end_token_id, self.query_token_id)
        return [token for token in ids if token is not None]

    def _read_official(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Turn an official `config.json` into ours; what neither sub-config knows is dropped."""
        llm, vision = kwargs.pop("llm_config"), self.vision_config
        if not isinstance(llm, (dict, PreTrainedConfig)):
            raise ValueError(f"llm_config must be a dict, not {type(llm).__name__}")
        llm = llm if isinstance(llm, dict) else llm.to_dict()
        self.architectures = None
        if self.image_token_id == type(self).image_token_id and "vocab_size" in llm:
            # It is not in the file: the nine new tokens are the last ids, `<IMG_CONTEXT>` the third of them.
            self.image_token_id = llm["vocab_size"] - _IMAGE_TOKEN_FROM_END
        if self.text_config is None:
            self.text_config = _only_fields(llm, MonoInternVLTextConfig, extra=("bias", "rope_theta", "rope_scaling"))
        if vision is not None and not isinstance(vision, MonoInternVLVisionConfig):
            vision = vision if isinstance(vision, dict) else vision.to_dict()
            self.vision_config = _only_fields(vision, MonoInternVLVisionConfig)
        kept = ("name_or_path", "_name_or_path", "_commit_hash", "torch_dtype", "dtype", "attn_implementation")
        return {name: value for name, value in kwargs.items() if name in kept}

    def __getattr__(self, name: str) -> Any:
        if name in _RELEASED_NAMES:
            here = _RELEASED_NAMES[name]
            raise AttributeError(f"{name} is of the released code's configuration; here: {here}, see docs/legacy.md")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @classmethod
    def from_dict(cls, config_dict, **kwargs):  # type: ignore[no-untyped-def]
        """As in transformers; options that override the file's are checked, and reach the parts that they are about."""
        overrides = {name: kwargs.pop(name) for name in _OVERRIDES if name in kwargs}
        if overrides.get("image_token_id", config_dict.get("image_token_id")) != config_dict.get("image_token_id"):
            # Those of the file belong to the token that it names.
            config_dict = {name: value for name, value in config_dict.items() if name not in _CONTROL_IDS}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):  # type: ignore[no-untyped-def]
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        # transformers warns about a foreign model_type; this one is ours under its older name.
        if config_dict.get("model_type") == "internvl_chat" and "llm_config" in config_dict:
            config_dict = {**config_dict, "model_type": cls.model_type}
        return config_dict, kwargs


def _of_text(name: str) -> property:
    """An attribute that is kept in `text_config` only."""
    return property(
        lambda config: getattr(config.text_config, name),
        lambda config, value: setattr(config.text_config, name, value),
        doc=f"`text_config.{name}`, for code that knows models of one part only.",
    )


for _name in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size"):
    setattr(MonoInternVLConfig, _name, _of_text(_name))

MonoInternVLConfig.register_for_auto_class()

__all__ = ["MonoInternVLConfig", "MonoInternVLTextConfig", "MonoInternVLVisionConfig"]
