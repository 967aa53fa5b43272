"""The bibliography of a study's article: entries of the software and the methods that it names."""

from __future__ import annotations

import re
from collections.abc import Mapping

BIBTEX = {
    "dosovitskiy2021": r"""@inproceedings{dosovitskiy2021,
  author = {Dosovitskiy, Alexey and Beyer, Lucas and Kolesnikov, Alexander and Weissenborn, Dirk
    and Zhai, Xiaohua and Unterthiner, Thomas and Dehghani, Mostafa and Minderer, Matthias and
    Heigold, Georg and Gelly, Sylvain and Uszkoreit, Jakob and Houlsby, Neil},
  title = {An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale},
  booktitle = {ICLR},
  year = {2021},
}""",
    "bengio2013": r"""@article{bengio2013,
  author = {Bengio, Yoshua and L{\'e}onard, Nicholas and Courville, Aaron},
  title = {Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
    Computation},
  journal = {arXiv:1308.3432},
  year = {2013},
}""",
    "hinton2015": r"""@article{hinton2015,
  author = {Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
  title = {Distilling the Knowledge in a Neural Network},
  journal = {arXiv:1503.02531},
  year = {2015},
}""",
    "paszke2019": r"""@inproceedings{paszke2019,
  author = {Paszke, Adam and Gross, Sam and Massa, Francisco and Lerer, Adam and others},
  title = {{PyTorch}: An Imperative Style, High-Performance Deep Learning Library},
  booktitle = {NeurIPS},
  year = {2019},
}""",
    "wightman2019": r"""@misc{wightman2019,
  author = {Wightman, Ross},
  title = {{PyTorch} Image Models},
  year = {2019},
  howpublished = {\url{https://github.com/huggingface/pytorch-image-models}},
}""",
    "onnxruntime": r"""@misc{onnxruntime,
  author = {{ONNX Runtime developers}},
  title = {{ONNX Runtime}},
  year = {2021},
  howpublished = {\url{https://onnxruntime.ai}},
}""",
    "han2015": r"""@inproceedings{han2015,
  author = {Han, Song and Pool, Jeff and Tran, John and Dally, William J.},
  title = {Learning both Weights and Connections for Efficient Neural Networks},
  booktitle = {NeurIPS},
  year = {2015},
}""",
    "li2017filters": r"""@inproceedings{li2017filters,
  author = {Li, Hao and Kadav, Asim and Durdanovic, Igor and Samet, Hanan and Graf, Hans Peter},
  title = {Pruning Filters for Efficient {ConvNets}},
  booktitle = {ICLR},
  year = {2017},
}""",
    "renda2020": r"""@inproceedings{renda2020,
  author = {Renda, Alex and Frankle, Jonathan and Carbin, Michael},
  title = {Comparing Rewinding and Fine-tuning in Neural Network Pruning},
  booktitle = {ICLR},
  year = {2020},
}""",
    "frankle2021": r"""@inproceedings{frankle2021,
  author = {Frankle, Jonathan and Dziugaite, Gintare Karolina and Roy, Daniel M. and Carbin,
    Michael},
  title = {Pruning Neural Networks at Initialization: Why Are We Missing the Mark?},
  booktitle = {ICLR},
  year = {2021},
}""",
    "sanh2020": r"""@inproceedings{sanh2020,
  author = {Sanh, Victor and Wolf, Thomas and Rush, Alexander M.},
  title = {Movement Pruning: Adaptive Sparsity by Fine-Tuning},
  booktitle = {NeurIPS},
  year = {2020},
}""",
    "lagunas2021": r"""@inproceedings{lagunas2021,
  author = {Lagunas, Fran{\c{c}}ois and Charlaix, Ella and Sanh, Victor and Rush, Alexander M.},
  title = {Block Pruning For Faster Transformers},
  booktitle = {EMNLP},
  year = {2021},
}""",
    "molchanov2019": r"""@inproceedings{molchanov2019,
  author = {Molchanov, Pavlo and Mallya, Arun and Tyree, Stephen and Frosio, Iuri and Kautz,
    Jan},
  title = {Importance Estimation for Neural Network Pruning},
  booktitle = {CVPR},
  year = {2019},
}""",
    "zhu2021vtp": r"""@article{zhu2021vtp,
  author = {Zhu, Mingjian and Tang, Yehui and Han, Kai},
  title = {Vision Transformer Pruning},
  journal = {arXiv:2104.08500},
  year = {2021},
}""",
    "kwon2022": r"""@inproceedings{kwon2022,
  author = {Kwon, Woosuk and Kim, Sehoon and Mahoney, Michael W. and Hassoun, Joseph and
    Keutzer, Kurt and Gholami, Amir},
  title = {A Fast Post-Training Pruning Framework for Transformers},
  booktitle = {NeurIPS},
  year = {2022},
}""",
    "rao2021": r"""@inproceedings{rao2021,
  author = {Rao, Yongming and Zhao, Wenliang and Liu, Benlin and Lu, Jiwen and Zhou, Jie and
    Hsieh, Cho-Jui},
  title = {{DynamicViT}: Efficient Vision Transformers with Dynamic Token Sparsification},
  booktitle = {NeurIPS},
  year = {2021},
}""",
    "liang2022": r"""@inproceedings{liang2022,
  author = {Liang, Youwei and Ge, Chongjian and Tong, Zhan and Song, Yibing and Wang, Jue and
    Xie, Pengtao},
  title = {Not All Patches are What You Need: Expediting Vision Transformers via Token
    Reorganizations},
  booktitle = {ICLR},
  year = {2022},
}""",
    "tang2022patch": r"""@inproceedings{tang2022patch,
  author = {Tang, Yehui and Han, Kai and Wang, Yunhe and Xu, Chang and Guo, Jianyuan and Xu,
    Chao and Tao, Dacheng},
  title = {Patch Slimming for Efficient Vision Transformers},
  booktitle = {CVPR},
  year = {2022},
}""",
    "goyal2020": r"""@inproceedings{goyal2020,
  author = {Goyal, Saurabh and Choudhury, Anamitra Roy and Raje, Saurabh M. and Chakaravarthy,
    Venkatesan T. and Sabharwal, Yogish and Verma, Ashish},
  title = {{PoWER-BERT}: Accelerating {BERT} Inference via Progressive Word-vector Elimination},
  booktitle = {ICML},
  year = {2020},
}""",
    "tang2020scop": r"""@inproceedings{tang2020scop,
  author = {Tang, Yehui and Wang, Yunhe and Xu, Yixing and Tao, Dacheng and Xu, Chunjing and Xu,
    Chao and Xu, Chang},
  title = {{SCOP}: Scientific Control for Reliable Neural Network Pruning},
  booktitle = {NeurIPS},
  year = {2020},
}""",
    "haurum2023": r"""@inproceedings{haurum2023,
  author = {Haurum, Joakim Bruslund and Escalera, Sergio and Taylor, Graham W. and Moeslund,
    Thomas B.},
  title = {Which Tokens to Use? Investigating Token Reduction in Vision Transformers},
  booktitle = {ICCV Workshops},
  year = {2023},
}""",
    "li2020asha": r"""@inproceedings{li2020asha,
  author = {Li, Liam and Jamieson, Kevin and Rostamizadeh, Afshin and Gonina, Ekaterina and
    Ben-tzur, Jonathan and Hardt, Moritz and Recht, Benjamin and Talwalkar, Ameet},
  title = {A System for Massively Parallel Hyperparameter Tuning},
  booktitle = {MLSys},
  year = {2020},
}""",
}
_CITED = re.compile(r"\\cite\{([^}]*)\}")
_ENTRY = re.compile(r"@(?!comment|string|preamble)\w+\s*\{\s*([^,\s}]+)\s*,", re.IGNORECASE)
_TITLE = re.compile(r"\btitle\s*=\s*[{\"]((?:[^{}\"]|\{[^{}]*\})*)[}\"]", re.IGNORECASE)

_SURNAME = re.compile(r"\bauthor\s*=\s*\{([^,]+),")


def keys_of(bibtex: str) -> list[str]:
    """The keys of BibTeX entries, in their order."""
    return _ENTRY.findall(bibtex)


def with_own_keys(text: str, bibtex: str) -> str:
    """A text whose citations lead to the entries of a study where it has the same publications.

    Args:
        text: LaTeX that cites keys of `BIBTEX`.
        bibtex: The entries of the study.

    Returns:
        The text, with the keys of the study for publications of equal title and first author.
    """
    own = _parts(bibtex)
    same = {key: _same(entry, own) or key for key, entry in BIBTEX.items()}

    def replaced(found: re.Match[str]) -> str:
        keys = [key.strip() for key in found[1].split(",")]
        return f"\\cite{{{','.join(same.get(key, key) for key in keys)}}}"

    return _CITED.sub(replaced, text)


def bibliography(text: str, bibtex: str) -> str:
    """references.bib: the entries of a study, and ours for what else a text cites.

    Args:
        text: LaTeX, all of it.
        bibtex: The entries of the study, which come before ours of the same key.

    Returns:
        BibTeX, with one entry for each key.
    """
    cited = {key.strip() for keys in _CITED.findall(text) for key in keys.split(",")}
    own = set(keys_of(bibtex))
    ours = [entry for key, entry in BIBTEX.items() if key in cited - own]
    return "\n\n".join([*([bibtex.strip()] if bibtex.strip() else []), *ours]) + "\n"


def _parts(bibtex: str) -> dict[str, str]:
    """The text of each entry by its key."""
    found = list(_ENTRY.finditer(bibtex))
    ends = [*(each.start() for each in found), len(bibtex)][1:]
    return {each[1]: bibtex[each.start() : end] for each, end in zip(found, ends, strict=True)}


def _same(entry: str, own: Mapping[str, str]) -> str | None:
    """The key of the publication of an entry of ours among others."""
    title, author = _plain(_TITLE, entry), _plain(_SURNAME, entry)
    for key, other in own.items():
        # Two of the sources have the title "Vision Transformer Pruning".
        if title and _plain(_TITLE, other) == title and author in _letters(other):
            return key
    return None


def _plain(part: re.Pattern[str], entry: str) -> str:
    found = part.search(entry)
    return "" if found is None else _letters(found[1])


def _letters(text: str) -> str:
    """The letters and digits of a text, which do not depend on how it is written."""
    return re.sub(r"[^a-z0-9]", "", text.lower())
