"""Run the notebooks from top to bottom in fresh kernels and store their outputs, so that a re-run changes nothing else.

python notebooks/execute.py            # all, in place: `make notebooks`
python notebooks/execute.py 01 05      # those whose names begin so
"""

from __future__ import annotations

import base64
import io
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from PIL import Image
from traitlets.config import Config

HERE = Path(__file__).resolve().parent
LIMIT = 600
"""Seconds for one notebook. On the embedded models each takes far less; a hub model takes what it takes."""
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def execute(path: Path, directory: Path = HERE, limit: int = LIMIT) -> nbformat.NotebookNode:
    """Run a notebook in a fresh kernel.

    Args:
        path: The notebook.
        directory: The working directory of the kernel.
        limit: Seconds for each cell.

    Returns:
        The notebook with its outputs, and without what differs from run to run or between machines.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(directory)}}
    with TemporaryDirectory() as sockets:
        # Files instead of ports: nobody else on the machine can listen, and no two kernels want the same.
        local = Config({"KernelManager": {"transport": "ipc", "ip": str(Path(sockets) / "kernel")}})
        NotebookClient(notebook, timeout=limit, kernel_name="python3", resources=where, config=local).execute()
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if png := output.get("data", {}).get("image/png"):
                output.data["image/png"] = smaller(png)
    return notebook


def smaller(png: str) -> str:
    """Store a picture with 256 colours: lines and letters are as sharp, in a third of the bytes.

    Args:
        png: In base64.

    Returns:
        The same in base64.
    """
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    buffer = io.BytesIO()
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def main() -> None:
    """Run the notebooks that are named, or all."""
    wanted = tuple(sys.argv[1:]) or ("",)
    for path in sorted(HERE.glob("*.ipynb")):
        if not path.name.startswith(wanted):
            continue
        started = time.perf_counter()
        nbformat.write(execute(path), path)
        sys.stdout.write(f"{path.name}: {time.perf_counter() - started:.0f} s, {path.stat().st_size // 1000} KB\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
