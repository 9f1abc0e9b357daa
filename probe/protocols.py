"""Named presets of probing: a table. Each row says where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from features.errors import ProbeError


@dataclass(frozen=True)
class Protocol:
    """The head; the strengths C or the numbers of neighbours k tried; folds, shots and seeds.

    per_size: instead of C, C = per_size / (D K) of D features and K classes. l2: a head by least
    squares with this penalty. trained: by epochs, see finetune.py. note: what a reader of the
    results must know.
    """

    name: str
    source: str
    head: str = "linear"
    C: tuple[float, ...] = ()
    per_size: float | None = None
    l2: float | None = None
    trained: bool = False
    note: str = ""
    k: tuple[int, ...] = ()
    temperature: float = 0.07
    folds: int = 5
    shots: tuple[int | None, ...] = (None,)
    seeds: int = 1

    def of_size(self, D: int, K: int) -> tuple[float, ...]:
        """Return the strengths for D features and K classes."""
        return self.C if self.per_size is None else (self.per_size / (D * K),)


def _powers(first: float, last: float, n: int) -> tuple[float, ...]:
    return tuple(float(c) for c in 10 ** np.linspace(first, last, n))


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="dinov2-logreg",
            C=_powers(-6, 5, 45),
            source="facebookresearch/dinov2, dinov2/eval/log_regression.py: no scaling, "
            "these 45 values of C; "
            "there a random 10 % of train chooses, here stratified folds by subject",
        ),
        Protocol(
            name="clip-readme",
            C=(0.316,),
            source="openai/CLIP, README.md: C = 0.316 (the folds only report)",
        ),
        Protocol(
            name="clip-paper",
            C=_powers(-6, 6, 96),
            source="Radford et al. 2021, arXiv:2103.00020, A.3: penalties 1e-6 to 1e6 in 96 steps, "
            "taken as scikit-learn's 1 / C; there a search by halves, here all 96",
        ),
        Protocol(
            name="patho-bench",
            C=_powers(-5, 6, 45),
            source="mahmoodlab/Patho-Bench: these 45 values of C",
        ),
        Protocol(
            name="mieb",
            C=(1.0,),
            shots=(16,),
            seeds=5,
            source="MIEB (embeddings-benchmark/mteb): 16 images per class, 5 draws, C = 1",
        ),
        Protocol(
            name="uni-linear",
            per_size=100.0,
            source="Chen et al. 2024 (UNI), mahmoodlab/UNI: C = 100 / (D K) on the norm of W",
            note="not UNI's own probe, which penalises the norm of W and not its square: "
            "the same C weighs otherwise here",
        ),
        Protocol(
            name="bigvision-fewshot",
            l2=2.0**10,
            shots=(1, 5, 10, 25),
            seeds=3,
            source="google-research/big_vision, big_vision/evaluators/fewshot_lsr.py: least "
            "squares on +-1, standardised features, penalty 2^10, 3 draws",
            note="probabilities are the softmax of least-squares scores: only their order counts",
        ),
        Protocol(
            name="study",
            trained=True,
            source="the study's public code, joanaapa/Foundation-Medical: AdamW by epochs, "
            "here on stored features",
        ),
        Protocol(
            name="knn",
            head="knn",
            k=(10, 20, 100, 200),
            source="Caron et al. 2021, arXiv:2104.14294; facebookresearch/dinov2, "
            "dinov2/eval/knn.py: cosine similarity, temperature 0.07; folds choose k",
        ),
        Protocol(
            name="zero-shot",
            head="zero-shot",
            source="Radford et al. 2021, arXiv:2103.00020, 3.1; mlfoundations/open_clip, "
            "zero_shot_classifier.py: texts of --prompts, nothing is trained",
        ),
    )
}


def find(name: str) -> Protocol:
    """Return a protocol by name. Raises ProbeError for an unknown one."""
    if name not in PROTOCOLS:
        raise ProbeError(f"unknown protocol {name!r}: want one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
