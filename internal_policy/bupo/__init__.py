"""Bottom-up Policy Optimization: align an internal policy first, then optimise the policy (arXiv 2512.19673v3).

from internal_policy import bupo

run = bupo.train("testbed/qwen3", layer=7, ipa_steps=10, max_steps=60)
run.history      # DataFrame, a row per step, with its phase
run.evaluation   # Avg@K and Pass@K of the trained model
run.model_dir    # a directory that transformers loads
bupo.transfer()  # at which layers the first phase moves the parameters as the second does
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from internal_policy.utils.imports import lazy_names

if TYPE_CHECKING:
    from internal_policy.bupo.config import TrainConfig
    from internal_policy.bupo.evidence import evidence_sentence, layer_evidence, training_outcomes
    from internal_policy.bupo.forward import internal_forward
    from internal_policy.bupo.gradient_transfer import transfer
    from internal_policy.bupo.hub import attach_evaluations, push_to_hub
    from internal_policy.bupo.run import Run
    from internal_policy.bupo.trainer import BuPOTrainer
    from internal_policy.bupo.trainer_config import BuPOConfig
    from internal_policy.bupo.training import train
    from internal_policy.bupo.transfer_config import TransferConfig
    from internal_policy.bupo.transfer_results import Transfer

_MODULES = {
    "BuPOConfig": "trainer_config",
    "BuPOTrainer": "trainer",
    "Run": "run",
    "evidence_sentence": "evidence",
    "internal_forward": "forward",
    "layer_evidence": "evidence",
    "training_outcomes": "evidence",
    "attach_evaluations": "hub",
    "push_to_hub": "hub",
    "TrainConfig": "config",
    "train": "training",
    "Transfer": "transfer_results",
    "TransferConfig": "transfer_config",
    "transfer": "gradient_transfer",
}

_NEED_TRL = ("BuPOConfig", "BuPOTrainer", "train", "transfer")

__all__ = [
    "BuPOConfig",
    "BuPOTrainer",
    "Run",
    "TrainConfig",
    "Transfer",
    "TransferConfig",
    "attach_evaluations",
    "evidence_sentence",
    "internal_forward",
    "layer_evidence",
    "push_to_hub",
    "train",
    "training_outcomes",
    "transfer",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULES, _NEED_TRL)
