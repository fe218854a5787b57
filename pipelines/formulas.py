"""The detection formulas as pure functions on tensors; every reduction is in float32.

Symbols: x_t latents, e_p and e_0 the embeddings of the prompt and of "", eps(x_t, e) the noise prediction,
d_t = eps(x_t, e_p) - eps(x_t, e_0) the noise difference (not scaled by guidance), m a mask over the latent grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FORMULA_VERSION = 4  # part of every fingerprint: raise it when a formula's value changes


def noise_from_v(v: Tensor, latents: Tensor, alpha_bar: Tensor) -> Tensor:
    """Noise prediction of a v-prediction model: eps = sqrt(abar) v + sqrt(1 - abar) x_t (Salimans & Ho 2022).

    Args:
        v: model output, [B, C, H, W].
        latents: x_t, [B, C, H, W].
        alpha_bar: cumulative alpha of the timestep, scalar.
    Returns:
        [B, C, H, W], float32: in half precision the sum would round v at the size of eps.
    """
    alpha_bar = alpha_bar.float()
    return alpha_bar.sqrt() * v.float() + (1 - alpha_bar).sqrt() * latents.float()


def energy_map(noise_difference: Tensor) -> Tensor:
    """E_t: the squared noise difference summed over channels.

    Args:
        noise_difference: d_t, [B, C, H, W].
    Returns:
        [B, H, W], float32.
    """
    return noise_difference.float().square().sum(1)


def magnitude(energy: Tensor) -> Tensor:
    """||d_t||_2 over C, H and W (Wen et al. 2024), from the energy map: sqrt(sum E_t).

    Args:
        energy: [..., H, W].
    Returns:
        [...], float32.
    """
    return energy.float().sum((-2, -1)).sqrt()


def ld(energy: Tensor, mask: Tensor) -> Tensor:
    """Localised detection score: ||d_t * m||_2 / mean(m) (Chen et al. 2025), from the energy map.

    Equal to sqrt(sum m^2 E_t) / mean(m), since the mask is the same for every channel. Does not change when the
    mask is scaled. NaN where the mask is zero everywhere, which is no mask.

    Args:
        energy: [..., H, W].
        mask: [..., H, W], non-negative, broadcast against `energy`.
    Returns:
        [...], float32.
    Raises:
        ValueError: the grids of energy and mask differ.
    """
    if energy.shape[-2:] != mask.shape[-2:]:
        raise ValueError(f"energy map {tuple(energy.shape)} and mask {tuple(mask.shape)} are on different grids")
    m = mask.float()
    return (m.square() * energy.float()).sum((-2, -1)).sqrt() / m.mean((-2, -1))


def energy_mask(energy: Tensor, size: int = 3) -> Tensor:
    """The energy map smoothed by a size x size mean, used as a mask: the noise difference localises itself.

    At the edges only the cells inside the map are counted. All ones where the energy is zero everywhere: it points
    nowhere, and `ld` under it is 0 then, as it should be.

    Args:
        energy: [B, H, W].
        size: odd width of the window; 1 leaves the map as it is.
    Returns:
        [B, H, W], float32.
    Raises:
        ValueError: an even size.
    """
    mean = smooth(energy, size)
    return torch.where(mean.amax((-2, -1), keepdim=True) == 0, torch.ones_like(mean), mean)


def smooth(energy: Tensor, size: int) -> Tensor:
    """Mean over the size x size window around every cell; at the edges only the cells inside the map are counted.

    Args:
        energy: [B, H, W].
        size: odd width of the window; 0 for the whole map, whose mean is in every cell then.
    Returns:
        [B, H, W], float32.
    Raises:
        ValueError: an even size.
    """
    energy = energy.float()
    if size == 0:
        return energy.mean((-2, -1), keepdim=True).expand_as(energy)
    if size % 2 == 0:
        raise ValueError(f"smoothing size {size} is even")
    return F.avg_pool2d(energy[:, None], size, stride=1, padding=size // 2, count_include_pad=False)[:, 0]


EXCESS_WINDOWS = (3, 5, 9, 0)
"""Windows of `excess`, in cells of the latent grid; 0 is the whole map."""
UPPER, SMALLEST_SPREAD = 0.84, 1e-3
"""Quantile that the spread reaches up to, one deviation of a normal distribution; and the least spread, of a logarithm:
captions whose energies differ by less than a thousandth say nothing of how energies vary."""


def log_energy(energy: Tensor, windows: Sequence[int] = EXCESS_WINDOWS) -> Tensor:
    """Logarithm of the energy map smoothed by every window; of the smallest normal number where the energy is zero.

    Args:
        energy: [B, H, W]. windows: sizes as in `smooth`.
    Returns:
        [B, len(windows), H, W], float32.
    """
    smoothed = torch.stack([smooth(energy, size) for size in windows], 1)
    return smoothed.clamp_min(torch.finfo(torch.float32).tiny).log()


def null_maps(log_energies: Tensor) -> tuple[Tensor, Tensor]:
    """What is usual of `log_energy` in every cell: median, and spread upwards (84 % quantile minus median); ours.

    Quantiles are interpolated linearly. The upper side alone: it is the large energies that are told apart.

    Args:
        log_energies: of a sample of N captions and one noise, [N, ...].
    Returns:
        median and spread, [...], float32; the spread is at least SMALLEST_SPREAD.
    """
    ordered = log_energies.float().sort(0).values

    def quantile(share: float) -> Tensor:
        place = share * (len(ordered) - 1)
        below = int(place)
        return torch.lerp(ordered[below], ordered[min(below + 1, len(ordered) - 1)], place - below)

    median = quantile(0.5)
    return median, (quantile(UPPER) - median).clamp_min(SMALLEST_SPREAD)


def excess(log_energies: Tensor, median: Tensor, spread: Tensor) -> Tensor:
    """Largest cell of the standardised map, over cells and windows: (log_energy - median) / spread; ours.

    Args:
        log_energies: `log_energy`, [B, S, H, W]. median, spread: of the same windows and noise (`null_maps`), the same
            shape or broadcast against it.
    Returns:
        [B], float32.
    """
    return ((log_energies.float() - median) / spread).amax((-3, -2, -1))


COMPONENTS, CALM, ROWS_A_COMPONENT = 16, 0.8, 8
"""Principal components that `common_parts` takes at most; the share of a sample, those with the least energy, that they
are of; and captions that one component rests on at least."""


def common_parts(differences: Tensor, components: int = COMPONENTS, share: float = CALM) -> Tensor:
    """What the noise differences of other captions have in common: their mean and first principal components; ours.

    They are of the four fifths with the least energy: a copied caption has more than others, and a component of its own
    would hide it and all that are copied like it.

    Args:
        differences: of a sample of N captions and one noise, [N, C, H, W].
        components: at most. share: of the sample, those with the least energy.
    Returns:
        the mean, then orthonormal components, zeros where there are fewer, [1 + components, C, H, W], float32.
    """
    flat = differences.float().flatten(1)
    energy = torch.stack([each.double().square().sum() for each in flat])
    calm = flat[energy.argsort(stable=True)[: max(1, round(share * len(flat)))]]
    parts = flat.new_zeros(1 + components, flat.shape[1])
    parts[0] = calm.mean(0)
    calm -= parts[0]
    gram = sum(cells.double() @ cells.double().T for cells in calm.split(1 << 14, 1))  # as many as captions: few
    values, vectors = torch.linalg.eigh(torch.as_tensor(gram))
    count = min(components, len(calm) // ROWS_A_COMPONENT)
    for place, at in enumerate(reversed(range(len(calm) - count, len(calm))), start=1):
        if values[at] > 1e-9 * values[-1]:
            parts[place] = (vectors[:, at] / values[at].sqrt()).float() @ calm
    return parts.unflatten(1, differences.shape[1:])


def less_common(difference: Tensor, parts: Tensor) -> Tensor:
    """What is left of noise differences without their mean and components.

    Args:
        difference: [B, C, H, W]. parts: of `common_parts`, under the same noise, [1 + R, C, H, W].
    Returns:
        [B, C, H, W], float32.
    """
    components = parts[1:].flatten(1)
    centred = (difference.float() - parts[0]).flatten(1)
    return (centred - (centred @ components.T) @ components).view(difference.shape)


PEAK_WINDOWS = (3,)
"""Window of `peak`."""


def peak(energy: Tensor, usual: Tensor) -> Tensor:
    """Largest cell of log_energy - usual; ours. Not divided by a spread, as `excess` is.

    Args:
        energy: [B, H, W]. usual: median of other captions' `log_energy` in PEAK_WINDOWS, [B, H, W] or [H, W].
    Returns:
        [B], float32: 1.1 is three times the usual energy.
    """
    return (log_energy(energy, PEAK_WINDOWS)[:, 0] - usual).amax((-2, -1))


def score_difference_map(energy: Tensor, noise: float) -> Tensor:
    """E_T / sigma_T^2 of the last step (Kim & Lee 2026): the difference of the scores -eps / sigma, squared.

    Args:
        energy: energy map of the noise predictions at the last step, [B, H, W].
        noise: sigma of the last level, sqrt(1 - abar) of a DDPM's.
    Returns:
        [B, H, W], float32.
    """
    return energy.float() / noise**2


def attention_probabilities(query: Tensor, key: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """softmax(Q K^T scale + bias) in float32.

    Args:
        query: [B, heads, HW, d]. key: [B, heads, L, d]. scale: 1 / sqrt(d) as the layer has it.
        bias: added to the logits, broadcast against [B, heads, HW, L]; masks keys with large negative numbers.
    Returns:
        [B, heads, HW, L], float32, rows summing to one.
    """
    logits = query.float() @ key.float().transpose(-1, -2) * scale
    return (logits if bias is None else logits + bias.float()).softmax(-1)


def webster(noise_uncond: Tensor, noise_difference: Tensor, guidance_scale: float, sigma_max: float) -> Tensor:
    """Webster's white-box one-step score: sigma_max^2 * mean(eps_cfg^2) (Webster 2023).

    The score is the mean square change of one Euler step; eps_cfg = eps(e_0) + g d. Taken at the first sampling
    step (t = 981 for 50 steps of SD1), where Webster uses t = 999.

    Args:
        noise_uncond: eps(x_t, e_0), [B or 1, C, H, W].
        noise_difference: d_t, [B, C, H, W].
        guidance_scale: g.
        sigma_max: sqrt((1 - abar) / abar) of the schedule's last training step.
    Returns:
        [B], float32.
    """
    guided = noise_uncond.float() + guidance_scale * noise_difference.float()
    return sigma_max**2 * guided.square().mean((1, 2, 3))


def cosine(noise_uncond: Tensor, noise_difference: Tensor) -> Tensor:
    """Angle of eps(e_0) and d: cosine over channels at every latent pixel, averaged (Asthana & Belagiannis 2026).

    Args:
        noise_uncond: [B or 1, C, H, W]. noise_difference: [B, C, H, W].
    Returns:
        [B], float32, in [-1, 1].
    """
    return F.cosine_similarity(noise_uncond.float(), noise_difference.float(), dim=1).mean((-2, -1))


ANISOTROPY_WEIGHTS = {768: (1.0, 2.0), 1024: (1.0, 0.1)}
"""The authors' weights by the width of the text embeddings: Stable Diffusion 1 (1.4) and 2. Those of Realistic Vision,
(2, 1), cannot be told by a model's shape: it is a fine-tuned Stable Diffusion 1."""


def anisotropy_weights(text_width: int) -> tuple[float, float]:
    """The weights of `anisotropy` for a model: the authors' where they give any, else those of Stable Diffusion 1.

    Args:
        text_width: of the text embeddings that enter cross-attention.

    Example:
        >>> anisotropy_weights(1024)
        (1.0, 0.1)
    """
    return ANISOTROPY_WEIGHTS.get(text_width, ANISOTROPY_WEIGHTS[768])


def anisotropy(magnitude: Tensor, cosine_low: Tensor, gamma: tuple[float, float]) -> Tensor:
    """gamma_1 ||d_T|| + gamma_2 cos_t (Asthana & Belagiannis 2026), cos_t taken on pure noise at a low timestep.

    Args:
        magnitude: ||d|| at the first step, [B]. cosine_low: `cosine` at the third last timestep, fed x_T, [B].
        gamma: weights, of `anisotropy_weights`.
    Returns:
        [B], float32.
    """
    return gamma[0] * magnitude.float() + gamma[1] * cosine_low.float()


def attention_entropy(probabilities: Tensor) -> Tensor:
    """Entropy over the tokens of one layer's mean cross-attention (Ren et al. 2024, mode E at step 0).

    Args:
        probabilities: attention over tokens averaged over heads and pixels, [B, L].
    Returns:
        [B], float32, nats.
    """
    return torch.special.entr(probabilities.float()).sum(-1)


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring masks to another grid bilinearly.

    Args:
        mask: [B, h, w]. size: (H, W).
    Returns:
        [B, H, W], float32.
    """
    if mask.shape[-2:] == torch.Size(size):
        return mask.float()
    return F.interpolate(mask.float()[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def image_distance(generated: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """||(xhat - x) * m||_2 over channels and pixels; without a mask m = 1.

    Args:
        generated: xhat, [..., 3, H, W], pixels in [0, 1]. reference: x, the same shape or broadcast against it.
        mask: [..., H, W] at pixel size.
    Returns:
        [...], float32.
    """
    difference = generated.float() - reference.float()
    if mask is not None:
        difference = difference * mask.float().unsqueeze(-3)
    return difference.square().sum((-3, -2, -1)).sqrt()


def gated(distance: Tensor, sscd: Tensor) -> Tensor:
    """-1[sscd < 0.5] * distance: `s`, `ls` and their relatives from a distance (Chen et al. 2025).

    The gate is strict as printed: at sscd = 0.5 exactly it is closed and the score is 0, its best value.

    Args:
        distance, sscd: the same shape.
    Returns:
        the same shape, float32, at most 0.
    """
    return torch.where(sscd < 0.5, -distance.float(), torch.zeros_like(distance, dtype=torch.float32))
