"""Every configuration, as frozen dataclasses: what a Mistral is, and what a run of minilora is told.

`ModelConfig` carries the names of Mistral's own `params.json`. `RunConfig` is the TOML file: its sections are
`[model] [lora] [data] [train] [eval]`, and every key can be given on the command line as `--section.key value`.
Nothing here imports torch, so the command line can print help and check a file at once.
"""

import os
import re
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, Literal

from minilora.errors import UserError
from minilora.patterns import check_pattern, first_match, hf_name

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENIZER_FILES = (
    "*tokenizer*.model*", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tekken.json",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
Optimizer = Literal["adamw", "adamw_8bit"]
Route = Literal["trained", "original", "requantized"]  # of a merge (checkpoint/merge.py)
TooLong = Literal["fail", "skip", "truncate"]  # of a conversation (data/encode.py)
MAX_NAMES = 1024  # in a list of layers
ALL_LINEAR = "all-linear"
UNNAMED = "the adapter's, else demo"  # a path of a base, where none is given
METRICS = ("exact_match", "f1", "bleu", "rouge")


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def _each(config: Any, section: str, names: str, ok: Callable[[Any], bool], must: str) -> None:
    for name in names.split():
        value = getattr(config, name)
        _check(ok(value), f"{section}{name} is {value!r}, but must {must}")


def _counts(config: Any, section: str, names: str, least: int = 1) -> None:
    must = f"be a whole number from {least:,} to 2^31 - 1"
    _each(config, section, names, lambda n: type(n) is int and least <= n < 2**31, must)


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a Mistral decoder, named as in `params.json`.

    `sliding_window` is W in "token i sees token j iff 0 <= i - j < W"; None means that it sees all before it.
    Where layers differ it is their pattern, repeated over the layers, such as (None, 32768, 32768, 32768).
    """

    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    sliding_window: int | tuple[int | None, ...] | None = None
    tied_embeddings: bool = False
    max_seq_len: int = 32_768

    def __post_init__(self) -> None:
        _counts(self, "", "dim n_layers head_dim hidden_dim n_heads n_kv_heads vocab_size max_seq_len")
        is_positive = "be a positive finite number"
        _each(self, "", "norm_eps rope_theta", lambda x: type(x) in (int, float) and 0 < x < inf, is_positive)
        for window in self.windows:
            fits = window is None or (type(window) is int and 0 < window < 2**31)
            _check(fits, f"sliding_window is {window!r}, but must be a whole number above 0, or null for none")
        n, heads, kv_heads = len(self.windows), self.n_heads, self.n_kv_heads
        fits = n > 0 and self.n_layers % n == 0
        _check(fits, f"sliding_window has {n} entries, which cannot be repeated over {self.n_layers} layers")
        _check(heads % kv_heads == 0, f"n_heads {heads} is not a multiple of n_kv_heads {kv_heads}")
        _check(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd, but rotary embedding turns pairs of numbers")

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The pattern of windows: layer i has the one at i modulo its length."""
        return self.sliding_window if isinstance(self.sliding_window, tuple) else (self.sliding_window,)

    @property
    def n_parameters(self) -> int:
        """Number of weights, a tied head counted once."""
        attention = self.dim * self.head_dim * 2 * (self.n_heads + self.n_kv_heads)
        block = attention + 3 * self.dim * self.hidden_dim + 2 * self.dim
        heads = 1 if self.tied_embeddings else 2
        return self.n_layers * block + heads * self.vocab_size * self.dim + self.dim


MISTRAL_7B = ModelConfig(
    dim=4096, n_layers=32, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8, vocab_size=32768, rope_theta=1e6
)  # v0.3


@dataclass(frozen=True)
class BaseConfig:
    """The base model of a run: the `[model]` section.

    Args:
        path: folder of a checkpoint, HF layout or Mistral's own; or ORG/NAME, ORG/NAME@REVISION on the hub (extra
            `hub`); or "demo", the tiny Mistral that ships in the package
        tokenizer: file or folder of the tokenizer, where it does not lie with the model
        old_hf_spaces: no space before an answer, as in Hugging Face's old chat template of v0.1 and v0.2
        quantize: the linear layers' storage; "auto" is "nf4" for the strategy qlora and where an adapter was
            trained so, else "none"
        double_quant: also store each NF4 block's absmax in 8 bits
        dtype: what is computed in; "auto" is bfloat16 on GPUs that have it, float16 on older ones, float32 on a CPU
        device: cpu, cuda or cuda:N; "auto" is the GPU if there is one
    """

    path: str = "demo"
    tokenizer: str | None = None
    old_hf_spaces: bool = False
    quantize: Literal["auto", "nf4", "none"] = "auto"
    double_quant: bool = True
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        fits = re.fullmatch(r"auto|cpu(:0)?|cuda(:\d+)?", self.device, re.ASCII)
        _check(bool(fits), f"model.device is {self.device!r}, but must be auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: y = W x + scale * B (A dropout(x)), scale = alpha / rank, or alpha / sqrt(rank) with rsLoRA.

    Args:
        rank: columns of B and rows of A
        alpha: numerator of the scale
        dropout: probability of zeroing an input of A while training
        targets: the linear layers that get an adapter: ends of their names, such as q_proj or layers.0.mlp.up_proj; or
            one regular expression, which a name such as model.layers.0.mlp.up_proj must match; or "all-linear"
        rslora: divide alpha by sqrt(rank) (https://arxiv.org/abs/2312.03732)
        dora: learn the length of each row of W + scale * B A apart from its direction (https://arxiv.org/abs/2402.09353)
        rank_pattern: another rank by layer: a name's end, or a regular expression for it, and the rank
        alpha_pattern: another alpha by layer
        modules_to_save: modules that learn whole, in float32, beside the adapters: embed_tokens, lm_head, model.norm;
            as PEFT has it, every module but the linear layers whose name so ends: norm is all the norms

    The methods take a layer's name in our model, layers.0.mlp.up_proj, and match as PEFT does, with "model." before it.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | str = PROJECTIONS
    rslora: bool = False
    dora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names, table = (Collection, "hold names"), (dict, "be a table of names")
        keys = {"targets": names, "modules_to_save": names, "rank_pattern": table, "alpha_pattern": table}
        for key, (held, must) in keys.items():
            value = getattr(self, key)
            named = isinstance(value, held) and all(isinstance(name, str) for name in value)
            _check(named, f"lora.{key} is {value!r}, but must {must}")
            fits = isinstance(value, str) or (len(value) <= MAX_NAMES and sum(map(len, value)) <= 100 * MAX_NAMES)
            _check(fits, f"lora.{key} holds more than {MAX_NAMES} names, or far too long ones")
        targets, saved = (getattr(self, key) for key in ("targets", "modules_to_save"))
        object.__setattr__(self, "targets", targets if isinstance(targets, str) else tuple(targets))
        object.__setattr__(self, "modules_to_save", (saved,) if isinstance(saved, str) else tuple(saved))
        ranges = ("rank", (int,), 2**31, "2^31, and whole"), ("alpha", (int, float), 1e30, "1e30")
        for key, kinds, limit, top in ranges:
            patterns, ways = getattr(self, f"{key}_pattern"), 0
            values = {key: getattr(self, key)} | {f"{key}_pattern {pattern}": n for pattern, n in patterns.items()}
            for name, value in values.items():
                fits = type(value) in kinds and 0 < value < limit
                _check(fits, f"lora.{name} is {value!r}, but must be above 0 and below {top}")
            for pattern in patterns:
                ways = check_pattern(rf".*\.({pattern})", f"lora.{key}_pattern", ways)
        _each(self, "lora.", "dropout", lambda share: 0 <= share < 1, "be at least 0 and below 1")
        _check(bool(self.targets), "lora.targets is empty; name at least one linear layer, such as q_proj")
        if isinstance(self.targets, str):
            check_pattern(self.targets, "lora.targets")

    # What means the layer that PEFT calls model.layers.0.mlp.up_proj (`hf_name`), and what does not:
    #
    #     targets, a list      up_proj, 0.mlp.up_proj     not proj       an end of whole parts
    #     targets, a string    .*up_proj                  not up_proj    a regular expression of the whole name
    #     patterns             up_proj, (up|down)_proj    not proj       a regular expression of an end of whole parts
    #
    # modules_to_save take any end: norm means model.norm and model.layers.0.input_layernorm.

    def scale_of(self, name: str) -> float:
        """What B A x is multiplied by in the layer of that name."""
        rank, alpha = self.rank_of(name), first_match(self.alpha_pattern, name, self.alpha)
        return float(alpha / (rank**0.5 if self.rslora else rank))

    def rank_of(self, name: str) -> int:
        """The rank of the adapter of that layer."""
        return first_match(self.rank_pattern, name, self.rank)

    def adapts(self, name: str) -> bool:
        """Whether `targets` means the linear layer of that name."""
        if isinstance(self.targets, str):
            return self.targets.lower() == ALL_LINEAR or re.fullmatch(self.targets, hf_name(name)) is not None
        return any(f".{hf_name(name)}".endswith(f".{target}") for target in self.targets)

    def saves(self, name: str) -> bool:
        """Whether `modules_to_save` means the module of that name, which is no linear layer with an adapter."""
        return hf_name(name).endswith(self.modules_to_save)


Sources = tuple[str, ...] | str


@dataclass(frozen=True)
class PrefixConfig:
    """Trained keys and values that stand before the tokens in every layer (prefix.py).

    Args:
        n_tokens: how many tokens' worth of them
    """

    n_tokens: int

    def __post_init__(self) -> None:
        _counts(self, "prefix.", "n_tokens")


@dataclass(frozen=True)
class DataConfig:
    """What is trained on and measured on: one file or several, JSONL, CSV, Parquet or plain text.

    A source of training data may have a weight, PATH:WEIGHT: the share of an epoch's samples that it gives, beside the
    weights of the others (1 unless given), as in --data.train "[a.jsonl:2, b.csv]". Without any weight each sample is
    seen once.

    Args:
        train: what is learnt
        validation: what is watched while training
        test: what is measured once, at the end
        general: text that the base should still predict afterwards: what is forgotten is measured on it
        validation_share: share of the training records that is split off as validation, instead of naming a file
        test_share: the same for test
        split_seed: of that split; a record's side depends on its content and this seed, not on the other records
        replay: share of the training tokens that comes from replay_from, against forgetting; from 0 to 0.99
        replay_from: text of the kind that the model should not forget; read where replay is above 0
        share: how much of the training records is used, to see what more data bring
        max_seq_len: tokens in a packed row
        too_long: what to do with a conversation of more than max_seq_len tokens; "truncate" drops its oldest exchanges,
            whole, and leaves it out if the last one alone is too long; raw text is cut into pieces
        bad_lines: what to do with a line that cannot be read, that the tokenizer refuses, or whose tokens are wrong, as
            by a template that was written into the text; "skip" gives up beyond ten, or 1 % of the file if that is more
    """

    train: Sources = ""
    validation: Sources | None = None
    test: Sources | None = None
    general: str | None = None
    validation_share: float = 0.0
    test_share: float = 0.0
    split_seed: int = 0
    share: float = 1.0
    replay: float = 0.0
    replay_from: Sources | None = None
    max_seq_len: int = 2048
    too_long: TooLong = "fail"
    bad_lines: Literal["fail", "skip"] = "fail"

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test", "replay_from"):
            value = getattr(self, name)
            if isinstance(value, str) and value[:1] == "[" and (value[-1:] == "]" or "]" not in value):  # of a command
                _check("]" in value, f"data.{name} is {value}, but a list must end with ]")
                value = tuple(part.strip() for part in value[1:-1].split(","))
                object.__setattr__(self, name, value)
            _check(not isinstance(value, tuple) or all(value), f"data.{name} holds an empty name; name a file")
        each = partial(_each, self, "data.")
        each("max_seq_len", lambda n: 1 < n <= 2**24, "be from 2 to 2^24")
        each("split_seed", lambda seed: seed >= 0, "not be negative")
        each("validation_share test_share", lambda share: 0 <= share < 1, "be at least 0 and below 1")
        each("replay", lambda share: 0 <= share <= 0.99, "be from 0 to 0.99")
        each("share", lambda share: 0 < share <= 1, "be above 0 and at most 1")
        for name in ("validation", "test"):
            twice = f"data.{name} and data.{name}_share both say where it comes from; give one of them"
            _check(not (getattr(self, f"{name}_share") and getattr(self, name)), twice)
        _check(self.validation_share + self.test_share < 1, "the shares split off leave no data.train")
        _check(not self.replay or bool(self.replay_from), "data.replay is a share of what? name data.replay_from")


@dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Args:
        output: the run folder
        strategy: which weights learn: "qlora" and "lora" the adapters, "prefix" keys and values before the tokens of
            every layer (P-tuning v2), "partial" some of the weights, "full" every weight; these two in float32
        layers: of "partial": that many layers at the top, with their norms
        parameters: of "partial": names of parameters or of what holds them, such as lm_head or layers.3.mlp.*
        reinit: weights that begin as random numbers of `seed`, not as the base's: "none", "top:N" for those of the N
            layers at the top, "all"; of "full", and top:N of "partial", too. The validation before training then
            measures these; what is forgotten is held against the base all the same
        adapter: a run, or a folder that holds an adapter, to go on from: adapters begin with its weights, and [lora]
            but for dropout, tokenizer and template are its own
        prefix_tokens: length of the prefix, in tokens; a prefix wants a far higher lr than adapters, such as 0.02
        lora_plus_ratio: LoRA+, learning rate of B as a multiple of A's; 1 is off (https://arxiv.org/abs/2402.12354)
        neftune_alpha: strength of NEFTune's noise on the embeddings; 0 is off (https://arxiv.org/abs/2310.05914)
        seed: of new adapters, dropout and the order of the data
        max_steps: optimizer steps; None means as many as `epochs` needs
        epochs: passes over the training file
        batch_size: packed rows in one forward pass
        accumulate: forward passes in one optimizer step; the loss is the mean over all their target tokens
        lr: the highest learning rate
        schedule: how the learning rate falls after the warm-up
        warmup_steps: updates in which it rises to lr
        min_lr_ratio: the last learning rate, as a share of lr, where the schedule is not constant and more than one
            update follows the warm-up
        weight_decay: AdamW's pull of the matrices towards zero, as a share of lr
        beta1: AdamW's memory of the gradient
        beta2: AdamW's memory of its square
        optimizer: AdamW with its state in 32 bits, 8 bytes a weight that learns, or in 8, a quarter of that
        paged: keep the optimizer's state in the host's memory, and on the GPU only what is being updated of it
        clip_norm: longest gradient allowed; 0 does not clip
        activation_checkpointing: keep only each block's input and compute the block again in backward; adapters without
            dropout do so by themselves, as far as memory demands it
        decode_ahead: on a GPU, decode the next weight in NF4 while this one is multiplied; takes memory for one more.
            Where memory holds all weights decoded there is nothing to do
        compile: on a CPU, compile what is elementwise to C++: faster steps in 16 bits, after some seconds of compiling
        checkpoint_every: steps between saved states
        keep_checkpoints: how many of them to keep
        max_bad_steps: stop after this many steps in a row whose loss or gradient is not finite
        tensorboard: also write the figures of each step for TensorBoard, into the run folder's tensorboard/
    """

    output: str = "runs/train"
    strategy: Literal["qlora", "lora", "prefix", "partial", "full"] = "qlora"
    layers: int | None = None
    parameters: tuple[str, ...] = ()
    reinit: str = "none"
    adapter: str | None = None
    prefix_tokens: int = 32
    lora_plus_ratio: float = 1.0
    neftune_alpha: float = 0.0
    seed: int = 0
    max_steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 1
    accumulate: int = 1
    lr: float = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 10
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    optimizer: Optimizer = "adamw"
    paged: bool = False
    clip_norm: float = 1.0
    activation_checkpointing: bool = False
    decode_ahead: bool = False
    compile: bool = False
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    max_bad_steps: int = 5
    tensorboard: bool = False

    def __post_init__(self) -> None:
        is_known = re.fullmatch("none|all|top:0*[1-9][0-9]{0,8}", self.reinit) is not None
        _check(is_known, f'train.reinit is {self.reinit!r}, but must be "none", "all", or "top:N" with N above 0')
        each = partial(_each, self, "train.")
        given = " ".join(name for name in ("max_steps", "layers") if getattr(self, name) is not None)
        counts = "batch_size accumulate checkpoint_every keep_checkpoints max_bad_steps prefix_tokens"
        _counts(self, "train.", f"{counts} {given}")
        _counts(self, "train.", "warmup_steps", 0)
        each("lora_plus_ratio", lambda ratio: 1 <= ratio <= 1e4, "be from 1 to 10,000")
        each("neftune_alpha", lambda alpha: 0 <= alpha <= 1e4, "be from 0 to 10,000")
        each("epochs lr", lambda x: 0 < x <= 1e4, "be above 0 and at most 10,000")
        each("min_lr_ratio", lambda share: 0 <= share <= 1, "be from 0 to 1")
        each("weight_decay clip_norm", lambda x: 0 <= x < inf, "be finite and not negative")
        each("seed", lambda seed: 0 <= seed < 2**63, "be from 0 to 2^63 - 1")
        each("beta1 beta2", lambda beta: 0 <= beta < 1, "be at least 0 and below 1")

    @property
    def base_learns(self) -> bool:
        """Whether weights of the base learn, and not what is added to it."""
        return self.strategy in ("partial", "full")

    @property
    def reinit_top(self) -> int | None:
        """How many layers `reinit` draws anew; None for every weight."""
        return None if self.reinit == "all" else int(self.reinit.partition(":")[2] or 0)


@dataclass(frozen=True)
class EvalConfig:
    """What is measured while training and after it.

    Args:
        every: steps between validations
        patience: stop after this many validations without a new best; 0 never stops early
        batch_size: rows or prompts in one forward pass
        answers: conversations of the validation and of the test file that are answered and compared
        metrics: what they are compared by: "exact_match", "f1", "bleu", "rouge" (evaluate/metrics.py)
        samples: validation prompts answered before and after training, side by side in samples.md
        max_new_tokens: longest answer generated
        general_tokens: target tokens of data.general that are looked at with each validation, for their loss and the
            distance to the base
        probes: file of prompts, one a line, that are answered before and after as well; by default eight that ship
            with the package. samples = 0 leaves them out
    """

    every: int = 50
    patience: int = 0
    batch_size: int = 8
    answers: int = 64
    metrics: tuple[str, ...] = ("exact_match", "f1")
    samples: int = 5
    max_new_tokens: int = 128
    general_tokens: int = 1024
    probes: str | None = None

    def __post_init__(self) -> None:
        for metric in self.metrics:
            _check(metric in METRICS, f"eval.metrics names {metric!r}; there are {', '.join(METRICS)}")
        _counts(self, "eval.", "every batch_size max_new_tokens general_tokens")
        _counts(self, "eval.", "patience answers samples", 0)


@dataclass(frozen=True)
class RunConfig:
    """One fine-tuning run: what config.toml holds."""

    model: BaseConfig = field(default_factory=BaseConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if self.train.strategy == "qlora" and self.model.quantize == "none":
            raise UserError('train.strategy "qlora" needs model.quantize "auto"; "lora" trains on a plain base')
        train, named = self.train, f'train.strategy "{self.train.strategy}"'
        plain = not (train.base_learns and self.model.quantize == "nf4")
        _check(plain, f'{named} cannot train NF4 weights; set model.quantize to "none" or "auto"')
        some, partial = bool(train.layers or train.parameters), train.strategy == "partial"
        _check(some or not partial, f"{named} needs train.layers, train.parameters, or both, to say what learns")
        _check(partial or not some, f"train.layers and train.parameters are for partial; {named} has no use for them")
        _check(train.reinit == "none" or train.base_learns, f"train.reinit would leave {named} weights it cannot train")
        _check(train.reinit != "all" or train.strategy == "full", f'{named} cannot train what train.reinit "all" draws')
        has_lora, why = train.strategy in ("lora", "qlora"), f"is for lora and qlora; {named} has no A and B"
        _check(has_lora or not self.lora.dora, f"lora.dora {why}")
        _check(has_lora or not self.lora.modules_to_save, f"lora.modules_to_save {why}")
        _check(has_lora or train.lora_plus_ratio == 1, f"train.lora_plus_ratio {why}")
        _check(has_lora or train.adapter is None, f"train.adapter {why}")

    @property
    def quantize(self) -> Literal["nf4"] | None:
        """`model.quantize` with "auto" resolved by the strategy: qlora's base is in NF4."""
        return "nf4" if self.train.strategy == "qlora" or self.model.quantize == "nf4" else None


def base_folder(path: str | Path) -> Path:
    """The folder of a base; "demo" is the tiny Mistral in the package."""
    return Path(__file__).parent / "demo" / "base" if path == "demo" else Path(os.path.expanduser(path))


def to_dict(config: Any) -> dict[str, Any]:
    """A (nested) dataclass as plain TOML values: None is left out, a tuple becomes a list."""

    def plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in pairs if value is not None}

    return asdict(config, dict_factory=plain)
