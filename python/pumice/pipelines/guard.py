"""What a pipeline shall do about pictures that are about to become replays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pumice.memorization import Calibration, Magnitude
from pumice.memorization.arguments import check_finite
from pumice.memorization.dynamic_guidance import LATEST_TIMESTEP

Mitigation = Literal["dynamic_guidance", "initial_noise", "embedding", "attention_rescaling", "refuse"]


@dataclass(frozen=True)
class Guard:
    """Flag a picture by its magnitude at the first step, and draw it in another way if it is flagged.

    ::

        flagged = |epsilon(x_T, t, prompt) - epsilon(x_T, t, negative prompt)|_2 > threshold

    Attributes:
        threshold: of one picture at the first step of the sampler, in epsilon. It holds for one model, dtype
            and picture size: take it from prompts that are known to be fresh, scored from one seed
            (`memorization.threshold_at`).
        mitigation: what happens to flagged pictures. The others keep theirs. How much it achieves depends on
            how firmly the model holds the picture: the testbed's, which replays with and without guidance,
            gives it up to "embedding", and to "dynamic_guidance" without `latest_timestep`, at early_scale=0.

            - "embedding" (default; Wen et al., arXiv:2407.21720): the prompt's embedding is optimised until
              its magnitude is `target`. Up to twelve calls more, ten of them with a backward.
            - "dynamic_guidance" (Jain et al., arXiv:2411.16738): guidance begins after the first
              local minimum of the magnitude. No further call of the denoiser.
            - "initial_noise" (Han et al., arXiv:2510.08625): x_T is moved out of the attraction basin, then
              no guidance while t > 900. Four calls more.
            - "attention_rescaling" (Ren et al., arXiv:2403.11052): attention leaves the padding tokens and
              moves to BOS. One call more.
            - "refuse": the picture is black, zeros for output_type="latent".
        target: of "embedding", a magnitude as threshold is. Default None: the threshold.
        early_scale: of "dynamic_guidance", the scale before guidance begins: 1 is the conditional prediction
            alone (default, the released code's), 0 the unconditional one, -2 the paper's opposite guidance.
        latest_timestep: of "dynamic_guidance", below which guidance begins, minimum or not. Default 500; None
            waits for a minimum that may not come, and the picture then has little of the prompt.

    Raises:
        ValueError: for numbers that are not finite or out of range, an unknown mitigation, and a target with
            one that has none.
    """

    threshold: float
    mitigation: Mitigation = "embedding"
    target: float | None = None
    early_scale: float = 1.0
    latest_timestep: int | None = LATEST_TIMESTEP

    @classmethod
    def calibrated(cls, calibration: Calibration, mitigation: Mitigation = "embedding") -> Guard:
        """A guard whose threshold is a calibration's for a single seed, which is what a picture has.

        The threshold is of the timestep that the calibration was made at: draw with as many steps. The target
        of "embedding" is what nine in ten fresh prompts stay below.

        Raises:
            ValueError: if the calibration is not of the magnitude at the first step.
        """
        if calibration.settings.metric != Magnitude():
            raise ValueError(
                f"calibration: got one of {calibration.settings.metric}, expected one of {Magnitude()}, "
                "which a guard reads"
            )
        target = calibration.quantiles["1"]["0.9"] if mitigation == "embedding" else None
        return cls(calibration.looks[0].flag_above, mitigation, target)  # the first look is at one seed

    def __post_init__(self) -> None:
        check_finite("threshold", self.threshold)
        if self.threshold <= 0:
            raise ValueError(f"threshold: got {self.threshold}, expected a magnitude above 0")
        known = get_args(Mitigation)
        if self.mitigation not in known:
            raise ValueError(f"mitigation: got {self.mitigation!r}, expected one of {', '.join(known)}")
        check_finite("early_scale", self.early_scale)
        if self.target is None:
            return
        if self.mitigation != "embedding":
            raise ValueError(
                f"target: got {self.target} with {self.mitigation!r}, expected it with 'embedding'"
            )
        check_finite("target", self.target)
        if self.target <= 0:
            raise ValueError(f"target: got {self.target}, expected a magnitude above 0")
