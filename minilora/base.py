"""A base to be used: what the command line names, with an adapter or without, found and checked before it is loaded."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from minilora.attention import has_flash_attention
from minilora.backend import pick_device, pick_dtype, told
from minilora.checkpoint.adapter import CONFIG, adapter_folder, read_adapter, read_adapter_config
from minilora.checkpoint.adapter_parts import Adapter
from minilora.checkpoint.chat_template import template_warnings
from minilora.checkpoint.load import load_model
from minilora.checkpoint.mistral_adapter import is_mistral
from minilora.checkpoint.open import Checkpoint, open_checkpoint
from minilora.checkpoint.provenance import check_origin, quantization, read_provenance, template_of, tokenizer_of
from minilora.config import UNNAMED, BaseConfig, LoraConfig, PrefixConfig
from minilora.errors import UserError, printable
from minilora.memory import as_text, free_bytes, one_line, private_bytes
from minilora.memory_at_rest import predict
from minilora.memory_of_step import StepPlan
from minilora.model import Mistral
from minilora.tokenizer import OLD_HF, Tokenizer, load_tokenizer


def found_adapter(path: str | Path) -> Path:
    """The folder of the adapter that is there, or that the run there has made. Raises UserError where there is none."""
    folder = adapter_folder(path)
    if not (folder / CONFIG).is_file() and not is_mistral(folder):
        run, whole = os.path.isfile(folder / "config.toml"), os.path.isdir(folder / "model")
        why = "this run is not finished" if run else "name the folder of an adapter, such as RUN/adapter"
        why = f"this run left a whole model: --model.path {folder}/model" if run and whole else why
        raise UserError(f"{folder}: holds no {CONFIG}; {why}")
    return folder


@dataclass(frozen=True)
class Base:
    """A checkpoint and its tokenizer, and how its weights are to be loaded.

    double_quant: whether the absmax of weights that are in NF4, or would be, are in 8 bits; adapter: its folder
    scaling: of an adapter of mistral-finetune; added: what the adapter configures; warnings: what is to be said of it
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    quantize: Literal["nf4"] | None
    double_quant: bool
    dtype: torch.dtype
    device: torch.device
    adapter: str | None
    scaling: float | None = None
    added: LoraConfig | PrefixConfig | None = None
    warnings: tuple[str, ...] = ()

    @staticmethod
    def find(
        config: BaseConfig, adapter: str | None = None, *, scaling: float | None = None, force: bool | None = False
    ) -> "Base":
        """What the config says, and where it leaves something open, what the adapter was trained on.

        adapter: its folder, or the file of its tensors
        force: None where there is no such option

        Raises UserError for what is not there or not to be read, and unless `force` is given, for another base,
        tokenizer or template than the adapter's, and for files of it that were altered.
        """
        adapter = None if adapter is None else str(found_adapter(adapter))
        made_on = read_provenance(adapter) if adapter is not None else {}
        quantize: Literal["nf4"] | None = "nf4" if config.quantize == "nf4" else None
        if (trained_on := made_on.get("quantization")) and config.quantize == "auto":
            quantize = "nf4" if trained_on.get("type") == "nf4" else None
            if trained_on.get("double_quant") is False:
                config = replace(config, double_quant=False)
        if adapter is not None and config.path == UNNAMED:
            if not made_on.get("base_path"):
                raise UserError(f"{adapter}: does not say where its base lies; give it with --model.path")
            config = replace(config, path=made_on["base_path"])
        checkpoint = open_checkpoint("demo" if config.path == UNNAMED else config.path)
        if config.quantize == "none":
            checkpoint.refuse_nf4('model.quantize "none"')
        tokenizer = tokenizer_for(config, checkpoint, made_on)
        if mismatch := tokenizer.mismatch(checkpoint.config.vocab_size):
            raise UserError(mismatch)
        device = pick_device(config.device)
        dtype, _ = pick_dtype(device, config.dtype)
        double_quant = checkpoint.double_quant if checkpoint.nf4 else config.double_quant
        said = template_warnings(checkpoint.folder, tokenizer.template, made_on)
        base = Base(
            checkpoint, tokenizer, quantize, double_quant, dtype, device, adapter, scaling, warnings=tuple(said)
        )
        if adapter is None:
            return base
        here = {
            "base_fingerprint": checkpoint.fingerprint(),
            "base_converted_from": checkpoint.converted_from(),
            "quantization": quantization(base.nf4_double_quant, dtype),
            "tokenizer": tokenizer_of(tokenizer),
        }
        said += check_origin(Path(adapter), made_on, here, force)
        added = read_adapter_config(adapter, checkpoint.config, scaling=scaling)
        return replace(base, added=added, warnings=tuple(said))

    @property
    def name(self) -> str:
        """What to call it before others, whom it does not concern where it lies: the checkpoint's name, of the hub's
        without the commit, or where there is an adapter the run's, RUN of RUN/adapter, or the folder's."""
        if self.adapter is None:
            name = self.checkpoint.name
            return name.partition("@")[0] if "/" in name else name
        folder = Path(os.path.abspath(self.adapter))
        return folder.parent.name if folder.name == "adapter" else folder.name

    @property
    def nf4_double_quant(self) -> bool | None:
        """`double_quant` of weights that are or will be in NF4; None of plain ones."""
        return self.double_quant if self.checkpoint.nf4 or self.quantize is not None else None

    def predict(self, rows: int, length: int, new: int | None = None) -> dict[str, int]:
        """Bytes by owner while `rows` texts of `length` tokens are continued by `new`, or scored if that is None."""
        sizes, double_quant = self.checkpoint.config, self.nf4_double_quant
        in_runs = self.device.type == "cpu" or has_flash_attention(self.device, self.dtype, sizes.head_dim)
        sees: Literal["runs", "mask"] = "runs" if in_runs and not isinstance(self.added, PrefixConfig) else "mask"
        plan = StepPlan(sizes, self.dtype, double_quant, self.added, rows, length, sees=sees, device=self.device)
        at_rest = predict(sizes, self.dtype, double_quant, self.added)
        learning = ("gradients", "optimizer")
        process = {"process": private_bytes()} if self.device.type == "cpu" else {}
        held = process | {owner: n for owner, n in at_rest.items() if owner not in learning}
        if new is not None and self.device.type == "cuda" and self.dtype.itemsize == 2 and "adapters" in held:
            held["adapters"] += held["adapters"] // 2  # cast once, for all tokens (`decode_graph.py`)
        return held | {owner: n for owner, n in plan.forward_bytes(new).items() if n}

    def check(self, *works: tuple[int, int, int | None]) -> dict[str, int]:
        """The prediction for the largest of `works`, (rows, length, new). Raises UserError if it does not fit."""
        predicted = max((self.predict(*work) for work in works), key=lambda owners: sum(owners.values()))
        total, free = sum(predicted.values()), free_bytes(self.device)
        if total > free:
            packed = "" if "packed weights" in predicted else ", or --model.quantize nf4"
            need = f"{as_text(total)} of memory are needed, {as_text(free)} are free"
            raise UserError(f"{need}: ask for fewer or shorter texts at a time{packed}")
        return predicted

    def load(self) -> Mistral:
        """The model in eval mode, with the adapter, which is read first: it is small, and soon known to be broken."""
        adapter = self.read_adapter() if self.adapter else None
        model = load_model(
            self.checkpoint.folder, quantize=self.quantize, double_quant=self.double_quant, dtype=self.dtype,
            device=self.device,
        )  # fmt: skip
        if adapter is not None:
            adapter.attach(model)
        return model.eval()

    def load_for(self, *works: tuple[int, int, int | None], say: Callable[[str], object]) -> Mistral:
        """The model, if there is memory for it and these works, see `check`.

        say: told what was overridden, device, base and ledger; once all is well, so that an error is one line
        """
        predicted, model = self.check(*works), self.load()
        for warning in self.warnings:
            say(f"warning: {warning}")
        say(printable(f"{told(self.device)}; base: {self.checkpoint.name}"))
        say(one_line(predicted))
        return model

    def read_adapter(self) -> Adapter:
        """The adapter, which must have been named."""
        assert self.adapter is not None
        return read_adapter(self.adapter, self.checkpoint.config, scaling=self.scaling)


def tokenizer_for(config: BaseConfig, checkpoint: Checkpoint, made_on: Mapping[str, Any] | None = None) -> Tokenizer:
    """The one that the config names, else the adapter's, else the base's own; its template is what they learnt.

    made_on: the adapter's provenance
    """
    made_on = made_on or {}
    template = template_of(made_on) or template_of(read_provenance(checkpoint.folder))
    file = config.tokenizer or made_on.get("tokenizer_path") or checkpoint.folder
    return load_tokenizer(file, old_hf_spaces=config.old_hf_spaces or template == OLD_HF)
