"""Noise levels, deterministic steps and units of a model's own schedule; one class a kind of diffusion.

x_t = a x_0 + s eps at a level of signal a and noise s. A raw output is affine in the clean latents x_0 it believes in,
so the difference of two outputs at the same x_t is q (x_0' - x_0) with q = d(output) / d(x_0). Differences are taken
first and brought to a unit then: converting both outputs and subtracting cancels at high noise.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from pipelines.errors import ModelError

Unit = Literal["epsilon", "velocity"]
"""What scores are differences of: noise predictions, or velocities where the first level has no signal (a = 0), since
the noise prediction does not depend on the prompt there by definition."""
NO_SIGNAL = 1e-6
"""A signal below this in magnitude is float32's rounding of none (1.2e-7 in the sigmas of flow matching)."""
SOME_PICTURE = 0.05
"""Share of the variance of a first level that may be a picture's and nothing is said; 0.6 % for 50 steps of SD 1."""


class NoiseLevel(NamedTuple):
    """One sampling step: what the denoiser is told, a and s of x_t = a x_0 + s eps, and those where the step ends."""

    timestep: Tensor
    signal: float
    noise: float
    next_signal: float
    next_noise: float


class Schedule(ABC):
    """How a model was trained to remove noise, and how it is sampled without randomness.

    Attributes:
        scheduler: diffusers' scheduler that samples as `step` does. noise_scale: standard deviation of x_T.
        sigma_max: s / a of the noisiest level of training; None where it is infinite.
        most_steps: the largest number of sampling steps.
    """

    classes: ClassVar[tuple[str, ...]]
    scheduler: Any
    noise_scale: float
    sigma_max: float | None
    most_steps: int

    def levels(self, steps: int, device: torch.device) -> list[NoiseLevel]:
        """The levels of a sampling, noisiest first; a signal that is rounding is 0.

        Raises:
            ModelError: more steps than the schedule has levels.
        """
        if steps > self.most_steps:
            raise ModelError(f"{steps}: this model has {self.most_steps} timesteps", "steps")
        found = self.own_levels(steps, device)
        return [level._replace(signal=0.0) if abs(level.signal) < NO_SIGNAL else level for level in found]

    @abstractmethod
    def own_levels(self, steps: int, device: torch.device) -> list[NoiseLevel]:
        """The levels as diffusers' scheduler computes them, noisiest first."""

    @abstractmethod
    def predictions(self, output: Tensor, latents: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Clean latents x_0 and noise eps that a raw output believes in, float32."""

    @abstractmethod
    def slope(self, level: NoiseLevel) -> float:
        """q = d(output) / d(x_0) at fixed x_t."""

    def scale_input(self, latents: Tensor, level: NoiseLevel) -> Tensor:
        """Latents as the denoiser takes them."""
        return latents

    def step(self, output: Tensor, level: NoiseLevel, latents: Tensor) -> Tensor:
        """The deterministic step to the next level, a' x_0 + s' eps: DDIM with eta 0, Euler for the others."""
        clean, noise = self.predictions(output, latents, level)
        return (level.next_signal * clean + level.next_noise * noise).to(latents.dtype)

    def check(self, steps: int | None = None) -> None:
        """Raise ModelError where a level has no noise, or signal and noise are not numbers that fit together.

        Args:
            steps: of the sampling whose levels are looked at; default 50, or as many as there are.
        """
        for level in self.levels(steps or min(50, self.most_steps), torch.device("cpu")):
            if not (0 <= level.signal <= 1 and 0 < level.noise < float("inf")):
                raise ModelError(
                    f"its scheduler's level {float(level.timestep):g} has signal {level.signal:g} and noise "
                    f"{level.noise:g}: nothing is diffused so"
                )

    def check_steps(self, steps: int) -> str:
        """What is to be said of a sampling of so many steps; empty where it begins near noise.

        It begins with noise alone, whatever its first level, where the model expects a x_0 + s eps: a picture's share
        of that variance is a^2 / (a^2 + s^2).

        Raises:
            ModelError: levels that `check` refuses, or a first one with more of the picture than of noise: what is
                predicted there of noise alone says nothing.
        """
        self.check(steps)
        first = self.levels(steps, torch.device("cpu"))[0]
        share = first.signal**2 / (first.signal**2 + first.noise**2)
        if share < SOME_PICTURE:
            return ""
        told = (
            f"{steps}: sampling begins at timestep {float(first.timestep):g}, where the model expects {share:.0%} of "
            "the variance to be a picture's, and is given noise alone: give more steps (50), or set timestep_spacing "
            "to trailing in scheduler/scheduler_config.json if it is distilled to so few"
        )
        if share > 0.5:
            raise ModelError(told, "steps")
        return told

    def unit(self, steps: int) -> Unit:
        """Unit of scores: noise predictions where the first level has signal, else velocities."""
        return "epsilon" if self.levels(steps, torch.device("cpu"))[0].signal > 0 else "velocity"

    def factor(self, level: NoiseLevel, unit: Unit) -> float:
        """What the difference of two raw outputs is multiplied by to be in `unit`.

        d(eps) / d(x_0) = -a / s. Velocity is eps - x_0 where a + s = 1 (flow matching) and a eps - s x_0 where
        a^2 + s^2 = 1 (v-prediction): -1 / s in both.
        """
        wanted = -level.signal / level.noise if unit == "epsilon" else -1 / level.noise
        return wanted / self.slope(level)

    @abstractmethod
    def in_unit(self, output: Tensor, latents: Tensor, level: NoiseLevel, unit: Unit) -> Tensor:
        """One raw output in `unit`, [B, C, H, W]: for what depends on a prediction itself, not on a difference."""


class VariancePreserving(Schedule):
    """a^2 + s^2 = 1, betas of a DDPM; sampled by DDIM with eta 0 (Song et al. 2021), as any of its samplers could be.

    Args:
        scheduler: any of `classes`; its betas, spacing and prediction type are taken over, its solver is not. Those of
            distilled models (LCM, TCD: `original_inference_steps`) space from the last level whatever they are told.
        thresholding: keep dynamic thresholding (models of pixels need it); off for latents.
    """

    classes = (
        *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler"),
        *("EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"),
        *("DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "KDPM2DiscreteScheduler", "UniPCMultistepScheduler"),
        *("KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler", "LCMScheduler", "TCDScheduler"),
    )
    beta_schedules = ("linear", "scaled_linear", "squaredcos_cap_v2")
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "use_flow_sigmas": (True,),
        "timestep_type": ("continuous",),
    }

    def __init__(self, scheduler: Any, thresholding: bool = False) -> None:
        from diffusers import DDIMScheduler

        config = scheduler.config
        schedule, prediction = config.get("beta_schedule"), config.get("prediction_type", "epsilon")
        if config.get("trained_betas") is None and schedule not in self.beta_schedules:
            raise ModelError(
                f"its scheduler's beta_schedule is {schedule!r}; read are {', '.join(self.beta_schedules)}"
            )
        if prediction not in ("epsilon", "v_prediction"):
            raise ModelError(f"its scheduler's prediction type is {prediction!r}; read are epsilon and v_prediction")
        for field, values in self.refused.items():
            if config.get(field) in values:
                raise ModelError(
                    f"its scheduler sets {field} to {config.get(field)!r}: that is no schedule of betas, and none of "
                    "those this family was published with"
                )
        options: dict[str, Any] = {} if thresholding else {"thresholding": False}
        if "original_inference_steps" in inspect.signature(type(scheduler).__init__).parameters:
            options["timestep_spacing"] = "trailing"
        self.scheduler = DDIMScheduler.from_config(config, clip_sample=False, **options)
        self.noise_scale = float(self.scheduler.init_noise_sigma)
        self.most_steps = int(self.scheduler.config.num_train_timesteps)
        self.v_prediction = prediction == "v_prediction"
        last = float(self.scheduler.alphas_cumprod[-1])
        self.sigma_max = ((1 - last) / last) ** 0.5 if last**0.5 > NO_SIGNAL else None
        if self.sigma_max is None and not self.v_prediction:
            raise ModelError(
                "its schedule ends without signal (rescale_betas_zero_snr) but it predicts noise, which says nothing "
                "of the prompt there: set prediction_type to v_prediction if it was trained so"
            )

    def own_levels(self, steps: int, device: torch.device) -> list[NoiseLevel]:
        scheduler = self.scheduler
        scheduler.set_timesteps(steps, device=device)
        first, last = int(scheduler.timesteps[0]), self.most_steps - 1
        if first > last:
            raise ModelError(
                f"its scheduler's steps_offset {scheduler.config.steps_offset} puts the first of {steps} steps at "
                f"timestep {first}, beyond its last, {last}: give fewer --steps"
            )
        before = scheduler.config.num_train_timesteps // steps
        levels = []
        for timestep in scheduler.timesteps:
            bar = float(scheduler.alphas_cumprod[int(timestep)])
            last = int(timestep) - before
            after = float(scheduler.alphas_cumprod[last] if last >= 0 else scheduler.final_alpha_cumprod)
            levels.append(NoiseLevel(timestep, bar**0.5, (1 - bar) ** 0.5, after**0.5, (1 - after) ** 0.5))
        return levels

    def predictions(self, output: Tensor, latents: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        out, x, a, s = output.float(), latents.float(), level.signal, level.noise
        if self.v_prediction:
            return a * x - s * out, a * out + s * x
        return (x - s * out) / a, out

    def step(self, output: Tensor, level: NoiseLevel, latents: Tensor) -> Tensor:
        return self.scheduler.step(output, level.timestep, latents, eta=0.0, return_dict=False)[0]

    def slope(self, level: NoiseLevel) -> float:
        return -1 / level.noise if self.v_prediction else -level.signal / level.noise

    def in_unit(self, output: Tensor, latents: Tensor, level: NoiseLevel, unit: Unit) -> Tensor:
        if self.v_prediction == (unit == "velocity"):
            return output
        if unit == "velocity":
            raise ValueError("a noise prediction has no velocity at a level without signal")
        return self.predictions(output, latents, level)[1]


class Edm(Schedule):
    """Karras et al. 2022: x = x_0 + sigma eps, D = c_skip x + c_out F(c_in x, ln(sigma) / 4); Playground v2.5."""

    classes = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")

    def __init__(self, scheduler: Any) -> None:
        from diffusers import EDMEulerScheduler

        self.scheduler = EDMEulerScheduler.from_config(scheduler.config)
        config = self.scheduler.config
        if config.prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(f"its scheduler's prediction type is {config.prediction_type!r}")
        self.noise_scale = float(self.scheduler.init_noise_sigma)
        self.sigma_max, self.data = float(config.sigma_max), float(config.sigma_data)
        self.most_steps = int(config.num_train_timesteps)
        self.sign = 1.0 if config.prediction_type == "epsilon" else -1.0

    def own_levels(self, steps: int, device: torch.device) -> list[NoiseLevel]:
        self.scheduler.set_timesteps(steps, device=device)
        sigmas = self.scheduler.sigmas.tolist()
        places = zip(self.scheduler.timesteps, sigmas[:-1], sigmas[1:], strict=True)
        return [NoiseLevel(timestep, 1.0, sigma, 1.0, after) for timestep, sigma, after in places]

    def scale_input(self, latents: Tensor, level: NoiseLevel) -> Tensor:
        return latents / (level.noise**2 + self.data**2) ** 0.5

    def slope(self, level: NoiseLevel) -> float:
        return self.sign * (level.noise**2 + self.data**2) ** 0.5 / (level.noise * self.data)

    def predictions(self, output: Tensor, latents: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        x, skip = latents.float(), self.data**2 / (level.noise**2 + self.data**2)
        clean = skip * x + output.float() / self.slope(level)
        return clean, (x - clean) / level.noise

    def in_unit(self, output: Tensor, latents: Tensor, level: NoiseLevel, unit: Unit) -> Tensor:
        if unit == "velocity":
            raise ValueError("this schedule has signal at every level: its unit is epsilon")
        return self.predictions(output, latents, level)[1]


class FlowMatching(Schedule):
    """Rectified flow (Lipman et al. 2023; Esser et al. 2024): x = (1 - s) x_0 + s eps, output v = eps - x_0; Euler.

    Args:
        scheduler: FlowMatchEulerDiscreteScheduler. mu: of dynamic shifting, where the scheduler has it switched on.
    """

    classes: ClassVar[tuple[str, ...]] = ("FlowMatchEulerDiscreteScheduler",)
    refused: ClassVar[tuple[str, ...]] = ("stochastic_sampling", "invert_sigmas")

    def __init__(self, scheduler: Any, mu: float | None = None) -> None:
        for field in self.refused:
            if scheduler.config.get(field):
                raise ModelError(f"its scheduler sets {field}: that is not the flow this family was published with")
        self.scheduler, self.noise_scale, self.sigma_max = scheduler, 1.0, None
        self.most_steps = int(scheduler.config.num_train_timesteps)
        self.mu = mu if scheduler.config.get("use_dynamic_shifting") else None

    def own_levels(self, steps: int, device: torch.device) -> list[NoiseLevel]:
        options = {} if self.mu is None else {"mu": self.mu}
        self.scheduler.set_timesteps(steps, device=device, **options)
        sigmas = self.scheduler.sigmas.tolist()
        places = zip(self.scheduler.timesteps, sigmas[:-1], sigmas[1:], strict=True)
        return [NoiseLevel(timestep, 1 - sigma, sigma, 1 - after, after) for timestep, sigma, after in places]

    def slope(self, level: NoiseLevel) -> float:
        return -1 / level.noise

    def predictions(self, output: Tensor, latents: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        v, x = output.float(), latents.float()
        return x - level.noise * v, x + level.signal * v

    def in_unit(self, output: Tensor, latents: Tensor, level: NoiseLevel, unit: Unit) -> Tensor:
        return output if unit == "velocity" else self.predictions(output, latents, level)[1]


class FlowSigmas(FlowMatching):
    """The same flow by a solver that was written for betas: Sana's. Its shift is taken over, its solver is not.

    Args:
        scheduler: one of `classes`. A field that moves its levels and is not the shift is refused.
    """

    classes = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")

    def __init__(self, scheduler: Any) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        config = scheduler.config
        if not config.get("use_flow_sigmas") or config.get("prediction_type") != "flow_prediction":
            raise ModelError(
                f"its scheduler has prediction type {config.get('prediction_type')!r} and use_flow_sigmas "
                f"{config.get('use_flow_sigmas')!r}: read are flow_prediction with flow sigmas"
            )
        steps, shift = config["num_train_timesteps"], config["flow_shift"]
        taken = {"num_train_timesteps": steps, "flow_shift": shift}
        taken |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        if moved := moving_fields(type(scheduler), taken, config):
            raise ModelError(
                f"its scheduler sets {moved[0]} to {config[moved[0]]!r}, which moves its levels from those of its "
                "flow_shift and is not read: take it out of scheduler/scheduler_config.json if the model does without"
            )
        super().__init__(FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps, shift=shift))


def moving_fields(kind: Any, taken: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Fields of a scheduler's configuration that move its levels from where the fields `taken` alone have them.

    Args:
        kind: diffusers' class. taken: fields of it. config: all of its fields.
    """

    def sigmas(**field: Any) -> list[float] | None:
        scheduler = kind(**taken, **field)
        try:
            scheduler.set_timesteps(min(50, taken["num_train_timesteps"]))
        except ValueError:  # a field that wants what no pipeline of the family gives (mu of UniPC's dynamic shifting)
            return None
        found: list[float] = scheduler.sigmas.tolist()
        return found

    plain, usual = sigmas(), kind(**taken).config
    others = [field for field in usual if not field.startswith("_") and config[field] != usual[field]]
    return [field for field in others if field not in taken and sigmas(**{field: config[field]}) != plain]


def open_scheduler(class_name: str, config: Mapping[str, Any], allowed: tuple[type[Schedule], ...]) -> Any:
    """diffusers' scheduler of a configuration, what it leaves out filled in by its class.

    Raises:
        ModelError: a class that none of the `allowed` schedules reads, values it does not take, or a library it lacks.
    """
    import diffusers

    known = [name for schedule in allowed for name in schedule.classes]
    if class_name not in known:
        raise ModelError(
            f"its scheduler is {class_name}, whose noise levels this family is not read with; read are "
            f"{', '.join(sorted(known))}"
        )
    kind = getattr(diffusers, class_name)
    try:
        whole = kind.from_config(dict(config)).config  # marks defaults, which another class's from_config would drop
        return kind.from_config({name: value for name, value in whole.items() if name != "_use_default_values"})
    except Exception as error:  # diffusers checks little: a wrong value raises whatever its arithmetic happens to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"its scheduler's configuration is not taken by {class_name}: {reason}") from error


def schedule_of(scheduler: Any, allowed: tuple[type[Schedule], ...], **options: Any) -> Schedule:
    """The schedule of a diffusers scheduler; `options` go to its class. Raises ModelError as `open_scheduler`."""
    name = type(scheduler).__name__
    for kind in allowed:
        if name in kind.classes:
            found: Any = kind
            return found(scheduler, **options)
    open_scheduler(name, {}, allowed)  # says what is read
    raise AssertionError(name)
