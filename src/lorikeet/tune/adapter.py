"""The base model and its LoRA adapter: load, apply, count, save.

model = load_base(folder, dtype)
model = apply_lora(model, config)
save_adapter(model, folder)
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging

from lorikeet.config import TuneConfig
from lorikeet.errors import InputError, MachineError, MissingExtraError, is_out_of_memory
from lorikeet.weights import quiet_transformers

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def pick_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(asked: str, device: torch.device) -> torch.dtype:
    """Return the compute type for `auto`, `float32`, `bfloat16` or `float16`.

    auto is bfloat16 where the hardware multiplies it natively (AVX-512 BF16 or AMX on a CPU), else float16 on a GPU
    and float32 on a CPU. Raises InputError for float16 on a CPU.
    """
    if asked == "float16" and device.type == "cpu":
        raise InputError("dtype float16 needs a GPU; use bfloat16, float32 or auto")
    if asked != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[asked]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def load_base(folder: Path, dtype: torch.dtype, device: torch.device, *, in_4bit: bool = False) -> Any:
    """Return the causal language model in `folder`, ready to be tuned, its linear layers in NF4 if `in_4bit`.

    Raises InputError if it cannot be read or lacks weights, MachineError if 4 bits are asked for and there is no GPU.
    """
    quiet_transformers()
    # Its report of weights is a table; what matters of it is said below.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers leaves it unannotated
    # With bitsandbytes weights have other names and shapes than in the file: there transformers' own check must do.
    more: dict[str, Any] = {"ignore_mismatched_sizes": not in_4bit, "output_loading_info": True}
    if in_4bit:
        if device.type != "cuda":
            raise MachineError("load_in_4bit needs a CUDA GPU and there is none; tune without it")
        more["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]  # transformers leaves it unannotated
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        more["device_map"] = {"": device.index or 0}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **more)
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "gpu") from error
    except Exception as error:  # a damaged file raises what its reader happens to meet
        if is_out_of_memory(error):
            raise
        why = " ".join(" ".join(str(error).split("\n")[:2]).split())
        raise InputError(f"{folder} is no causal language model that can be loaded: {why}") from error
    model, found = loaded
    wrong = [] if in_4bit else sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if wrong:
        raise InputError(
            f"{folder} lacks weights that its config.json asks for, or has them in another shape ({', '.join(wrong[:3])}); "
            "restore its files"
        )
    model.config.use_cache = False
    return model if in_4bit else model.to(device)


def apply_lora(model: Any, config: TuneConfig) -> PeftModel:
    """Return `model` with its weights frozen and a float32 LoRA adapter on `config.target_modules`.

    LoRA: Hu et al., 2021, arXiv 2106.09685. With PiSSA the base's weights lose what the adapter starts with.
    Raises InputError if no module has any of these names.
    """
    from peft import LoraConfig, get_peft_model

    check_targets(model, config)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=True if config.init_lora_weights == "default" else config.init_lora_weights,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # PEFT 0.21 reads a property that transformers 5.2x renamed; the message is theirs to settle.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        tuned = get_peft_model(model, lora, autocast_adapter_dtype=True)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return tuned


def check_targets(model: Any, config: TuneConfig) -> None:
    """Raise InputError for target modules that `model` does not have, naming those it has; its head is none of them.

    And for a PiSSA adapter of a higher rank than one of them has.
    """
    head = model.get_output_embeddings()  # the loss reads it, and it is often the embedding, which export writes once
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    found = {name.rpartition(".")[2] for name, module in linear.items() if module is not head}
    missing = [name for name in config.target_modules if name not in found]
    if missing:
        raise InputError(
            f"target_modules: {', '.join(missing)} cannot get an adapter in {config.model}; what can: {', '.join(sorted(found))}"
        )
    if config.init_lora_weights == "pissa":
        widths = {
            name: min(m.weight.shape) for name, m in linear.items() if name.rpartition(".")[2] in config.target_modules
        }
        narrowest = min(widths, key=lambda name: widths[name])
        if config.lora_r > widths[narrowest]:
            raise InputError(
                f"lora_r is {config.lora_r}, and {narrowest} has {widths[narrowest]} principal components for "
                f"init_lora_weights pissa; give --lora-r {widths[narrowest]} or less"
            )


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that are tuned, by name, in a fixed order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(model: PeftModel, folder: Path, *, base: str, start: dict[str, torch.Tensor] | None = None) -> None:
    """Write `adapter_config.json`, naming `base` as the model it belongs to, and `adapter_model.safetensors`.

    `start` holds the parameters that a PiSSA adapter began with: what is written then is the difference, a plain LoRA
    of twice the rank that belongs to the base as it was.
    """
    saved = model.peft_config["default"]
    saved.base_model_name_or_path = base
    saved.target_modules = sorted(saved.target_modules)  # PEFT's set is written in another order by every process
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for the base's config on the hub to see whether it was resized
        model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the run has its own
    if start is not None:
        _subtract_start(folder, start)


def _subtract_start(folder: Path, start: dict[str, torch.Tensor]) -> None:
    """Rewrite the adapter in `folder` as [A; A0] and [B, -B0], so that it adds B A - B0 A0."""
    weights = load_file(folder / WEIGHTS)
    for name, first in start.items():
        saved = name.replace(".default.", ".")
        if ".lora_A." in name:
            weights[saved] = torch.cat([weights[saved], first.to(weights[saved])])
        else:
            weights[saved] = torch.cat([weights[saved], -first.to(weights[saved])], dim=1)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    grown = math.sqrt(2) if config["use_rslora"] else 2
    config |= {"r": 2 * config["r"], "lora_alpha": config["lora_alpha"] * grown, "init_lora_weights": True}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
