"""The command `internal-policy models`: the table of families."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from internal_policy.cli.command import ConsoleOptions
from internal_policy.utils.output import print_json


@dataclass(frozen=True, kw_only=True)
class ModelsCommand(ConsoleOptions):
    """Print the families of models that are known, and where their parts are."""

    def run(self) -> None:
        """Run the command."""
        from rich import box
        from rich.table import Table

        from internal_policy.models.families import FAMILIES
        from internal_policy.utils.console import console as open_console

        print_json({"command": "models", "families": {name: asdict(family) for name, family in FAMILIES.items()}})
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in (
            "family",
            "model_type",
            "layers",
            "A^l is the output of",
            "F^l is the output of",
            "block",
            "logits",
        ):
            table.add_column(heading, overflow="fold")
        for model_type, family in FAMILIES.items():
            factor = f" x {family.write_multiplier}" if family.write_multiplier else ""
            block = "parallel" if family.parallel is True else "sequential"
            if isinstance(family.parallel, str):
                block = f"parallel if {family.parallel}"
            _, attention_write, _, ffn_write = family.capture_paths()
            table.add_row(
                family.name,
                model_type,
                family.layers,
                attention_write + factor,
                ffn_write + factor,
                block + ("" if family.pre_norm else ", no norm before modules"),
                ", ".join(filter(None, (family.logit_softcap, family.logit_scale, family.logit_divisor))) or "-",
            )
        # A pipe has no width, and a truncated table would be useless in it.
        console = open_console()
        if not console.is_terminal:
            console.width = 200
        console.print(table)
        console.print(
            "Any other causal LM is tried by structure: it is used where eq. 4 holds for what was found, and refused "
            "otherwise. Every model is proved on every load.",
        )
