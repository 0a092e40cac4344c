"""Modules borrowed for a while: frozen, in eval mode, and put back as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from .data_gradient import lean

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@contextmanager
def frozen(modules: nn.Module | Iterable[nn.Module], *, data_gradient: bool = False) -> Iterator[None]:
    """Freeze every parameter and switch to eval mode inside the block.

    At its end, also after an error, requires_grad of each parameter is as it was, and so are train/eval mode,
    attention processor and hooks of each submodule (torch's own, and those added to diffusers' HookRegistry).

    Args:
        modules: one or several.
        data_gradient: also swap the forward methods of convolutions, ResNet blocks and gated GELUs for ones
            that keep in memory what the gradient in their input needs and no more. Outputs and gradients are
            those of the modules up to rounding; once differentiable.
    """
    modules = [modules] if isinstance(modules, nn.Module) else list(modules)
    parts: list[Any] = list(dict.fromkeys(part for module in modules for part in module.modules()))
    # by name, too: offloading puts another parameter in the place of one
    requires_grad = [
        (part, name, parameter, parameter.requires_grad)
        for part in parts
        for name, parameter in part.named_parameters(recurse=False)
    ]
    training = [(part, part.training) for part in parts]
    processors = [(part, part.processor) for part in parts if hasattr(part, "set_processor")]
    hooks = [(getattr(part, name), dict(getattr(part, name))) for part in parts for name in _HOOKS]
    registered = [(part, _registry_hooks(part)) for part in parts]
    try:
        for _, _, parameter, _ in requires_grad:
            parameter.requires_grad_(False)
        for part in parts:
            part.training = False
        with lean(parts) if data_gradient else nullcontext():
            yield
    finally:
        for part, name, parameter, flag in requires_grad:
            parameter.requires_grad_(flag)
            now = part._parameters.get(name)
            if now is not None:
                now.requires_grad_(flag)
        for part, flag in training:
            part.training = flag
        for part, processor in processors:
            if part.processor is not processor:
                part.set_processor(processor)
        for live, saved in hooks:
            saved |= {key: hook for key, hook in live.items() if _is_lazy(hook)}
            live.clear()
            live.update(saved)
        for part, names in registered:
            for name in reversed(_registry_hooks(part)):
                if name not in names:
                    part._diffusers_hook.remove_hook(name, recurse=False)


def _is_lazy(hook: Any) -> bool:
    """Whether transformers added the hook at its first need for hidden states; it does so only once."""
    return getattr(hook, "__module__", "").startswith("transformers.")


def _registry_hooks(module: Any) -> list[str]:
    return list(module._diffusers_hook.hooks) if hasattr(module, "_diffusers_hook") else []
