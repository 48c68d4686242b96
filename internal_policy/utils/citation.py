"""How to cite the paper and this software, as BibTeX: the facts of CITATION.cff, which is not in a wheel."""

from __future__ import annotations

__version__ = "0.1.0"

PAPER = """@article{tan2025bottomup,
  title         = {Bottom-up Policy Optimization: Your Language Model Policy Secretly Contains Internal Policies},
  author        = {Tan, Yuqiao and Wang, Minzheng and He, Shizhu and Liao, Huanxuan and Zhao, Chengfeng and
                   Lu, Qiunan and Liang, Tian and Zhao, Jun and Liu, Kang},
  year          = {2025},
  eprint        = {2512.19673},
  archivePrefix = {arXiv},
  url           = {https://arxiv.org/abs/2512.19673}
}"""
"""The BibTeX entry of the paper."""

_SOFTWARE = """@software{internal_policy,
  title   = {internal_policy: internal policies of language models, their entropies and boundary layers},
  author  = {{The internal_policy authors}},
  version = {VERSION},
  license = {MIT}
}"""


def bibtex() -> str:
    """The BibTeX entries of the paper and of this software."""
    return f"{PAPER}\n\n{_SOFTWARE.replace('VERSION', __version__)}"
