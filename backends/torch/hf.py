"""Any other architecture: the transformers model, with our cache, masks and hooks around it.

The model's own forward decides what its layers do; we decide what is cached (all positions, in
every layer, so that any rollback works even with sliding windows) and who sees whom.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from steersman.core.errors import BackendError, InvalidInput, SteersmanError, UsageError
from steersman.core.model import Forward, ModelInfo, Tokenizer

from .cache import KVCache, Layout
from .hf_hooks import ACTIVE, Call, active, call_cache, register
from .model import Captured, TorchModel

_LAYER_LISTS = ("layers", "h", "blocks")
_FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "final_norm", "norm_f")
_KNOWN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_PROBE_LENGTH = 6


class HFModel(TorchModel):
    """A transformers causal language model.

    Attributes
    ----------
    module : transformers.PreTrainedModel
        Holds the parameters. It is in evaluation mode and its gradients are on as transformers
        left them: ``model.module(input_ids).logits`` is differentiable outside of sessions.
    """

    def __init__(
        self,
        info: ModelInfo,
        tokenizer: Tokenizer,
        device: torch.device,
        compute: torch.dtype,
        module: Any,
    ) -> None:
        super().__init__(info, tokenizer, device, compute)
        self._module = module
        self._decoder = module.get_decoder()
        config = module.config.get_text_config()
        self._softcap = getattr(config, "final_logit_softcapping", None)
        layers = _find(self._decoder, _LAYER_LISTS)
        self._final_norm = _find(self._decoder, _FINAL_NORMS)
        if layers is None or len(layers) < info.layers or self._final_norm is None:
            raise UsageError(
                f"{info.path}: architecture {info.architecture} is built in a way that the torch "
                "backend does not know"
            )
        for i, layer in enumerate(layers[1 : info.layers], start=1):
            layer.register_forward_pre_hook(_keep_input(i), with_kwargs=True)
        self._final_norm.register_forward_pre_hook(_keep_final, with_kwargs=True)

    @property
    def module(self) -> Any:
        return self._module

    def _lookup(self, ids: Tensor) -> Tensor:
        return self._decoder.get_input_embeddings()(ids)

    def _norm(self, x: Tensor) -> Tensor:
        return self._final_norm(x)

    def _project(self, x: Tensor) -> Tensor:
        logits = self._module.get_output_embeddings()(x).float()
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits

    def _step(self, layout: Layout, cache: KVCache, x: Tensor, captured: Captured) -> Tensor:
        call = Call(layout=layout, captured=captured)
        with active(call):
            self._decoder(
                inputs_embeds=layout.unpack(x),
                position_ids=layout.grid_positions(),
                past_key_values=call_cache(self.info.layers, cache, layout),
                use_cache=True,
            )
        if call.final is None:
            raise BackendError("torch: the model did not reach its final norm")
        final = layout.pack(call.final)
        captured.hidden = {i: layout.pack(h) for i, h in captured.hidden.items()}
        if 0 in captured.want_hidden:
            captured.hidden[0] = x  # before learned positions are added, where a model has them
        if self.info.layers in captured.want_hidden:
            captured.hidden[self.info.layers] = final
        return final

    def check(self) -> None:
        """Compare our use of the parts with the model's own forward on a few tokens.

        Raises
        ------
        UsageError
            They disagree: the architecture does something between its parts that we do not know.
        """
        count = min(_PROBE_LENGTH, self.info.context)
        ids = torch.arange(count, device=self.device)[None] % self.info.vocab_size
        try:
            with self.session() as session:
                ours = session.forward(Forward(keep=0, tokens=ids[:, :-1].tolist(), logits="none"))
                ours = session.forward(Forward(keep=count - 1, tokens=ids[:, -1:].tolist()))
            with torch.no_grad():
                theirs = self._module(input_ids=ids).logits[:, -1].float()
            problem = None
        except (SteersmanError, TypeError, ValueError, RuntimeError) as error:
            problem = str(error)
        else:
            scale = float(theirs.abs().max())
            tolerance = (1e-3 if self.compute == torch.float32 else 0.1) * max(scale, 1.0)
            apart = float((ours.logits - theirs).abs().max())
            if not apart <= tolerance:
                problem = f"logits differ by {apart:.3g} from the model's own"
        if problem is not None:
            raise UsageError(
                f"{self.info.path}: architecture {self.info.architecture} does not fit the torch "
                f"backend ({problem})"
            )

    def close(self) -> None:
        self._module = self._decoder = self._final_norm = None


def _find(decoder: Any, names: tuple[str, ...]) -> Any:
    return next((getattr(decoder, name) for name in names if hasattr(decoder, name)), None)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    value: Tensor = args[0] if args else kwargs["hidden_states"]
    return value


def _keep_input(index: int) -> Any:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = ACTIVE.call
        if call is not None and index in call.captured.want_hidden:
            call.captured.hidden[index] = _first(args, kwargs)

    return hook


def _keep_final(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if ACTIVE.call is not None:
        ACTIVE.call.final = _first(args, kwargs)


def load_module(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Build the model of a folder from its config and safetensors; never from remote code.

    Raises
    ------
    InvalidInput
        transformers cannot build it, or weights are missing (they would silently be random).
    """
    register()
    transformers.utils.logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            module, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation="steersman",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, in one line
            )
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise InvalidInput(f"{folder}: transformers cannot open it ({first})") from error
    for name in sorted(report["missing_keys"]):
        raise InvalidInput(f"{folder}: tensor {name!r} is missing")
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise InvalidInput(
            f"{folder}: tensor {name!r} has shape {tuple(stored)}, config.json asks for "
            f"{tuple(wanted)}"
        )
    kinds = set(getattr(module.config.get_text_config(), "layer_types", None) or ())
    if kinds - _KNOWN_LAYERS:
        raise UsageError(
            f"{folder}: layers of type {', '.join(sorted(kinds - _KNOWN_LAYERS))} cannot go back; "
            "the torch backend needs attention in every layer"
        )
    return module.to(device).eval()


def keep_layers(module: Any, kept: Sequence[int], where: str) -> None:
    """Leave a transformers model only these of its layers, renumbered from 0.

    Raises
    ------
    UsageError
        The architecture keeps its layers, or what it knows of each, in a way that is not known.
    """
    decoder, config = module.get_decoder(), module.config.get_text_config()
    name = next((name for name in _LAYER_LISTS if hasattr(decoder, name)), None)
    whole = list(getattr(decoder, name)) if name is not None else []
    if name is None or len(whole) != config.num_hidden_layers:
        raise UsageError(f"{where}: the layers of this architecture cannot be chosen on torch")
    for new, old in enumerate(kept):
        for part in whole[old].modules():
            if getattr(part, "layer_idx", None) is not None:
                part.layer_idx = new  # where its keys and values are cached
    setattr(decoder, name, torch.nn.ModuleList(whole[i] for i in kept))
    # What the model looks up by number while it runs.
    for key, value in list(config.to_dict().items()):
        if "layer" in key and isinstance(value, list | tuple) and len(value) == len(whole):
            setattr(config, key, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)
