"""Sample with vLLM, if requested: the same prompts, limits and end tokens through its own engine.

vLLM loads the weights a second time, next to the model whose states are captured, into the GPU memory that is still
free; the engine is shut down before the states are captured. Written for ``vllm.LLM`` of vLLM 0.33.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from internal_policy.data.responses import Response
from internal_policy.generation.requests import Request, end_ids, length_limits, to_responses
from internal_policy.models import LanguageModel, check
from internal_policy.utils.errors import UserError

_MIN_BATCH = 1024
"""Requests that are passed to vLLM at a time, which batches by itself; an interruption loses at most so many."""
_SHARE_OF_FREE_MEMORY = 0.9
"""The rest is for what the captured model allocates in addition to its weights."""


def effective_batch_size(generator: str, batch_size: int) -> int:
    """Compute how many requests are passed to the generator at a time; vLLM, which batches by itself, gets 1024."""
    return max(batch_size, _MIN_BATCH) if generator == "vllm" else batch_size


def refuse_generator(generator: str, *, in_memory: bool, processes: int = 1) -> None:
    """Refuse vLLM, before any model is loaded, if it is not installed or cannot sample from this model.

    Args:
        generator: ``transformers`` or ``vllm``.
        in_memory: whether the model was given as an object.
        processes: number of processes that share the work.
    """
    if generator != "vllm":
        return
    if in_memory:
        raise UserError(
            "generator 'vllm' was given with a model object, and vLLM loads the weights itself; give the model's name "
            "or directory, or leave generator out"
        )
    if processes > 1:
        raise UserError(
            f"--generator vllm was given to {processes} processes and takes the GPU for itself; start one process, or "
            "leave --generator out"
        )
    if find_spec("vllm") is None:
        raise UserError(
            "--generator vllm needs the package vllm and a GPU; install it with `pip install vllm`, or leave "
            "--generator out"
        )


class VllmSampler:
    """Replaces ``generation.sample`` by vLLM: ``with VllmSampler(...) as sample``.

    The first call starts the engine, so that a resumed run with nothing left to sample starts none.
    """

    def __init__(
        self, model: LanguageModel, requests: Sequence[Request], max_new_tokens: int, trust_remote_code: bool
    ) -> None:
        """Prepare the settings of the engine.

        Args:
            model: the model, loaded by its name; vLLM loads the same revision and dtype.
            requests: all requests that will be sampled.
            max_new_tokens: limit on the tokens of a response.
            trust_remote_code: run code that comes with the checkpoint.
        """
        require_first_gpu(model.device)
        self._model, self._trust_remote_code = model, trust_remote_code
        limits = length_limits(model, requests, max_new_tokens)
        self._longest = max((len(r.prompt_ids) + n for r, n in zip(requests, limits, strict=True)), default=1)
        self._engine: Any = None

    def __enter__(self) -> VllmSampler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._engine is None:
            return
        self._engine = None
        import_module("vllm.distributed").cleanup_dist_env_and_memory()

    def __call__(
        self, requests: Sequence[Request], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[Response]:
        """Sample one response per request; see ``generation.sample``.

        Raises:
            UserError: vLLM cannot load the model.
        """
        vllm: Any = import_module("vllm")
        if self._engine is None:
            self._engine = self._start_engine()
        limits = length_limits(self._model, requests, max_new_tokens)
        params = [
            vllm.SamplingParams(
                n=1,
                temperature=temperature,
                seed=request.stream_seed(seed),
                max_tokens=limit,
                # The end tokens that vLLM finds by itself are ignored in favour of these.
                ignore_eos=True,
                stop_token_ids=end_ids(self._model),
                detokenize=False,
            )
            for request, limit in zip(requests, limits, strict=True)
        ]
        prompts = [vllm.TokensPrompt(prompt_token_ids=request.prompt_ids) for request in requests]
        outputs = self._engine.generate(prompts, params, use_tqdm=False)
        sampled = [list(output.outputs[0].token_ids) for output in outputs]
        return to_responses(self._model, requests, sampled, limits)

    def _start_engine(self) -> Any:
        vllm: Any = import_module("vllm")
        where, _ = check(self._model.name, revision=self._model.revision, trust_remote_code=self._trust_remote_code)
        revision = None if Path(where).is_dir() else self._model.revision
        try:
            return vllm.LLM(
                model=where,
                revision=revision,
                tokenizer_revision=revision,
                # Its "auto" makes float16 of float32.
                dtype=str(self._model.dtype).removeprefix("torch."),
                trust_remote_code=self._trust_remote_code,
                # Its "auto" reads pickles too.
                load_format="safetensors",
                max_model_len=self._longest,
                gpu_memory_utilization=free_share(self._model.device),
                # The checkpoint's sampling defaults would change the policy.
                generation_config="vllm",
            )
        except (ValueError, RuntimeError, ImportError, OSError) as error:
            why = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"{self._model.name}: vLLM cannot load it ({why}); leave --generator out") from error


def require_first_gpu(device: torch.device) -> None:
    """Refuse a model that is not on the GPU that vLLM uses."""
    if device.type != "cuda":
        raise UserError(f"--generator vllm needs a GPU and the model is on {device}; leave --generator out")
    if device.index not in (None, 0):
        raise UserError(
            f"--generator vllm was given with --device {device}, and vLLM takes the first GPU; choose one by "
            "CUDA_VISIBLE_DEVICES and leave --device out"
        )


def free_share(device: torch.device) -> float:
    """Compute the share of a GPU's memory that vLLM may take, next to the model that is already there."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return float(_SHARE_OF_FREE_MEMORY * free / total)
