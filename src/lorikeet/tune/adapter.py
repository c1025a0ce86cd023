"""The base model and its LoRA adapter: load, apply, count, save.

model = load_base(folder, dtype)
model = apply_lora(model, config)
save_adapter(model, folder)
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from lorikeet.config import TuneConfig
from lorikeet.errors import InputError
from lorikeet.weights import quiet_transformers

if TYPE_CHECKING:
    from peft import PeftModel


def pick_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(asked: str, device: torch.device) -> torch.dtype:
    """Return the compute type for `auto`, `float32` or `bfloat16`.

    auto is bfloat16 where the hardware multiplies it natively (AVX-512 BF16 or AMX on a CPU), else float32.
    """
    if asked != "auto":
        return torch.bfloat16 if asked == "bfloat16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def load_base(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the causal language model in `folder`, ready to be tuned. Raises InputError if it cannot be read."""
    quiet_transformers()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder} is no causal language model that can be loaded: {str(error).splitlines()[0]}"
        ) from error
    model.config.use_cache = False
    return model.to(device)  # type: ignore[arg-type]  # a decorator hides that it takes a device


def apply_lora(model: Any, config: TuneConfig) -> PeftModel:
    """Return `model` with its weights frozen and a float32 LoRA adapter on `config.target_modules`.

    LoRA: Hu et al., 2021, arXiv 2106.09685. Raises InputError if no module has any of these names.
    """
    from peft import LoraConfig, get_peft_model

    found = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    missing = [name for name in config.target_modules if name not in found]
    if missing:
        raise InputError(
            f"target_modules: {', '.join(missing)} not in {config.model}; its linear layers are {', '.join(sorted(found))}"
        )
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # PEFT 0.21 reads a property that transformers 5.2x renamed; the message is theirs to settle.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        tuned = get_peft_model(model, lora, autocast_adapter_dtype=True)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return tuned


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that are tuned, by name, in a fixed order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(model: PeftModel, folder: Path, *, base: str) -> None:
    """Write `adapter_config.json`, naming `base` as the model it belongs to, and `adapter_model.safetensors`."""
    model.peft_config["default"].base_model_name_or_path = base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for the base's config on the hub to see whether it was resized
        model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the run has its own
