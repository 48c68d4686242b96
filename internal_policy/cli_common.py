"""What the commands share of their options: how a model is loaded, and what can be told of it before that."""

from __future__ import annotations

from typing import Annotated

import typer

from internal_policy.config import BACKENDS, DEVICE_MAPS, DTYPES, GENERATORS, QUANTIZATIONS

Dtype = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")]
Device = Annotated[str, typer.Option(help="auto (cuda, mps, cpu) or a torch device.")]
DeviceMap = Annotated[
    str | None, typer.Option(help=f"Share the layers out among several devices: one of {', '.join(DEVICE_MAPS)}.")
]
Quantization = Annotated[
    str | None,
    typer.Option(
        help=f"Quantise the layers' weights while loading, by bitsandbytes: one of {', '.join(QUANTIZATIONS)}."
    ),
]
Generator = Annotated[
    str,
    typer.Option(help=f"What samples the responses: one of {', '.join(GENERATORS)} (if installed, on a GPU)."),
]
Backend = Annotated[str, typer.Option(help=f"What captures the states: one of {', '.join(BACKENDS)}.")]
Remote = Annotated[
    bool, typer.Option("--remote", help="Run the model on NDIF (--backend nnsight; the key in NDIF_API_KEY).")
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the checkpoint's code.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def require_key(remote: bool | str) -> None:
    """Refuse to go to NDIF without a key, before the hub is asked for a model.

    Args:
        remote: what ``--remote`` says.

    Raises:
        UserError: nnsight is not installed, or there is no key.
    """
    if remote is True:
        from internal_policy.capture import nnsight_library

        nnsight_library.require_key(nnsight_library.load_nnsight())
