"""Affine lenses with random maps, on disk in both formats, and what they do to a state, written out in float64."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file


def random_maps(n_layers, width, seed=0, layers=None):
    """W_l [d, d] and b_l [d] of layers 0..L-1, large enough to change every policy."""
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: (
            torch.randn(width, width, generator=generator) / width**0.5,
            0.3 * torch.randn(width, generator=generator),
        )
        for layer in (range(n_layers) if layers is None else layers)
    }


def save_lens(directory, maps, **config):
    """Write a lens in the format of this package."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {f"layer.{layer}.weight": weight.clone() for layer, (weight, _) in maps.items()}
    tensors |= {f"layer.{layer}.bias": bias.clone() for layer, (_, bias) in maps.items()}
    save_file(tensors, directory / "lens.safetensors")
    return directory


def translators(maps):
    """The module whose state dict tuned-lens saves: a linear map for each of H^0..H^{L-1}."""
    found = torch.nn.ModuleList()
    for weight, bias in maps.values():
        linear = torch.nn.Linear(*weight.shape)
        linear.weight.data, linear.bias.data = weight.clone(), bias.clone()
        found.append(linear)
    return found


def save_as_tuned_lens(directory, maps, **config):
    """Write a lens as TunedLens.save does, in tuned_lens/nn/lenses.py."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(translators(maps).state_dict(), directory / "params.pt")
    width = next(iter(maps.values()))[1].numel()
    settings = {
        "base_model_name_or_path": "tiny",
        "d_model": width,
        "num_hidden_layers": len(maps),
        "bias": True,
        "base_model_revision": None,
        "unembed_hash": "0" * 64,
        "lens_type": "linear_tuned_lens",
    }
    (directory / "config.json").write_text(json.dumps({**settings, **config}))
    return directory


def exact_map(maps, layer, state, residual=True):
    """x + W_l x + b_l, or W_l x + b_l, in float64; x itself for a layer without a map."""
    state = state.double()
    if layer not in maps:
        return state
    weight, bias = (part.double() for part in maps[layer])
    return state * residual + torch.einsum("ij,nj->ni", weight, state) + bias
