"""The diffusers library's schedulers as an objective and a sampler: which noise a network knows.

| scheduler | here | sampled |
|---|---|---|
| DDPM, DDPMParallel | a table of betas | equal: the whole chain |
| DDIM, DDIMParallel | a table of betas | equal: 50 steps, their spacing |
| EDMEuler, EDMDPMSolverMultistep | EDM's preconditioning | equal |
| FlowMatchEulerDiscrete | a straight path | equal, from 1 - 1e-6 where theirs begins at 1 |
| the others of STAND_INS | a table, or a straight path | by a solver of ours, which is said |

Any other class is refused: taken for another it would give grey or noise without a word. Of those
above, every key is understood, is at the value that makes no difference, or is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusion_pl.errors import UserError
from diffusion_pl.interop.values import choice, flag, got, only, real, whole

SCHEDULER = "_scheduler"  # our key for the scheduler's class, beside the network's `_class_name`
USUAL = "DDPMScheduler"
STEPS = 50

_TIMESTEPS = "diffusion_pl.diffusion.timesteps."
_PARTS = "diffusion_pl.diffusion.objective."
TABLES = {
    "linear": f"{_TIMESTEPS}LinearBetas",
    "scaled_linear": f"{_TIMESTEPS}ScaledLinearBetas",
    "squaredcos_cap_v2": f"{_TIMESTEPS}CosineBetas",
    "sigmoid": f"{_TIMESTEPS}SigmoidBetas",
    "laplace": f"{_TIMESTEPS}LaplaceBetas",
}
BETWEEN = ("linear", "scaled_linear", "sigmoid")  # those with a first and a last beta
PREDICTIONS = {
    "epsilon": "diffusion_pl.objectives.ddpm.PredictNoise",
    "v_prediction": "diffusion_pl.objectives.ddpm.PredictVelocity",
    "sample": "diffusion_pl.objectives.ddpm.PredictImage",
}
VARIANCES = {
    "fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large",
    "learned_range": "learned",
}  # fmt: skip

BETA_KEYS = {
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "prediction_type", "rescale_betas_zero_snr", "variance_type", "predict_epsilon",
}  # fmt: skip
CLIP_KEYS = {
    "clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio",
    "sample_max_value",
}  # fmt: skip
SPACING_KEYS = {"timestep_spacing", "steps_offset", "set_alpha_to_one"}
# How the library's own solvers step; they change no network, and where ours stands in, nothing.
SOLVER_KEYS = {
    "solver_order", "algorithm_type", "solver_type", "lower_order_final", "euler_at_final",
    "final_sigmas_type", "lambda_min_clipped", "use_karras_sigmas", "use_exponential_sigmas",
    "use_beta_sigmas", "use_lu_lambdas", "interpolation_type", "sigma_min", "sigma_max",
    "predict_x0", "disable_corrector", "solver_p", "skip_prk_steps", "predictor_order",
    "corrector_order", "tau_func", "use_dynamic_shifting", "time_shift_type", "shift_terminal",
    "noise_sampler_seed", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len",
}  # fmt: skip
FLOW_KEYS = {"use_flow_sigmas", "flow_shift", "shift", "invert_sigmas", "stochastic_sampling"}
EDM_KEYS = {"sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho"}
OLD_KEYS = {"tensor_format", "timestep_type"}
KEYS = (
    BETA_KEYS | CLIP_KEYS | SPACING_KEYS | SOLVER_KEYS | FLOW_KEYS | EDM_KEYS | OLD_KEYS
)  # fmt: skip

# Solvers that stand in for the library's on a table of betas, and its first and last beta.
USUAL_BETAS, LATENT_BETAS = (1e-4, 0.02), (0.00085, 0.012)
STAND_INS: dict[str, tuple[str, tuple[float, float]]] = {
    "PNDMScheduler": ("euler", USUAL_BETAS),
    "EulerDiscreteScheduler": ("euler", USUAL_BETAS),
    "EulerAncestralDiscreteScheduler": ("ancestral", USUAL_BETAS),
    "HeunDiscreteScheduler": ("heun", LATENT_BETAS),
    "LMSDiscreteScheduler": ("deis", USUAL_BETAS),
    "KDPM2DiscreteScheduler": ("heun", LATENT_BETAS),
    "KDPM2AncestralDiscreteScheduler": ("ancestral", LATENT_BETAS),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", USUAL_BETAS),
    "DPMSolverSinglestepScheduler": ("dpmpp_2m", USUAL_BETAS),
    "DEISMultistepScheduler": ("deis", USUAL_BETAS),
    "UniPCMultistepScheduler": ("unipc", USUAL_BETAS),
}
FLOW_STAND_INS = {"FlowMatchHeunDiscreteScheduler": "heun"}
# Where a flow's sampling begins; sigma is infinite at t = 1. And where its training ends.
FLOW_START, FLOW_EDGE = 1 - 1e-6, 1e-4


@dataclass(frozen=True)
class Process:
    """What a scheduler says, as nodes of an experiment.

    Args:
        objective: node.
        sampler: node.
        notes: what a user is to know of it.
        learned: whether the network says the variance too.
    """

    objective: dict[str, Any]
    sampler: dict[str, Any]
    notes: tuple[str, ...] = ()
    learned: bool = False


def process(config: Mapping[str, Any]) -> Process:
    """The objective and the sampler of a scheduler.

    Args:
        config: its arguments, its class under SCHEDULER (DDPMScheduler where none is named); absent
            keys have that class's defaults.

    Raises:
        UserError: the class or the first key that has no equal here, by its name.
    """
    name = class_of(config)
    return READERS[name](config, name)


def class_of(config: Mapping[str, Any]) -> str:
    """The scheduler's class.

    Raises:
        UserError: it is not understood here.
    """
    name = config.get(SCHEDULER) or USUAL
    if not isinstance(name, str) or name not in READERS:
        raise UserError(
            f"scheduler: {str(name)[:80]} is not understood here, so the noise that the network "
            f"was trained with would be a guess; understood are {', '.join(READERS)}"
        )
    return name


def _table(config: Mapping[str, Any], betas: tuple[float, float]) -> dict[str, Any]:
    """The node of a table of betas."""
    T = whole({"num_train_timesteps": config.get("num_train_timesteps") or 1000},
              "num_train_timesteps", 1000, 2, 100_000)  # fmt: skip
    trained = config.get("trained_betas")
    if trained is not None:
        if not isinstance(trained, list) or len(trained) != T:
            raise UserError(
                f"trained_betas: must be num_train_timesteps = {T:,} numbers {got(trained)}"
            )
        if not all(type(beta) in (int, float) and 0 < beta < 1 for beta in trained):
            raise UserError(f"trained_betas: must be numbers between 0 and 1 {got(trained)}")
        table: dict[str, Any] = {"_target_": f"{_TIMESTEPS}Betas", "betas": trained}
    else:
        target = choice(config, "beta_schedule", "linear", TABLES)
        table = {"_target_": target, "T": T}
        if config.get("beta_schedule", "linear") in BETWEEN:
            table["beta_1"] = real(config, "beta_start", betas[0], 1.0)
            table["beta_T"] = real(config, "beta_end", betas[1], 1.0)
    if flag(config, "rescale_betas_zero_snr", False):
        if _prediction(config) == "epsilon":
            raise UserError(
                "rescale_betas_zero_snr: leaves nothing of the image at the last timestep, where "
                "prediction_type epsilon says nothing of it; must be v_prediction or sample"
            )
        table = {"_target_": f"{_TIMESTEPS}ZeroTerminal", "timesteps": table}
    return table


def _prediction(config: Mapping[str, Any]) -> str:
    if config.get("predict_epsilon") is False and "prediction_type" not in config:
        return "sample"  # as the library's first versions called it
    return str(config.get("prediction_type", "epsilon"))


def _T(table: Mapping[str, Any]) -> int:
    if "timesteps" in table:
        return _T(table["timesteps"])
    return len(table["betas"]) if "betas" in table else int(table["T"])


def _variance(config: Mapping[str, Any], usual: str | None) -> str | None:
    """Of the reverse chain; None where the scheduler has no word of it."""
    value = config.get("variance_type", usual)
    if value == "fixed_large_log":
        raise UserError(
            "variance_type: fixed_large_log gives no number in the library itself (the root of a "
            "logarithm); say which is meant, as by --set variance_type=fixed_large"
        )
    if value is None:
        return None
    return str(choice({"variance_type": value}, "variance_type", None, VARIANCES))


def _objective(config: Mapping[str, Any], table: dict[str, Any], learned: bool) -> dict[str, Any]:
    """DDPM where it is that, else an objective of its parts."""
    prediction = _prediction(config)
    target = choice({"prediction_type": prediction}, "prediction_type", None, PREDICTIONS)
    preconditioning = {"_target_": target, "timesteps": table}
    if learned:
        chain = {"_target_": "diffusion_pl.objectives.likelihood.ReverseChain"}
        return {
            "_target_": "diffusion_pl.objectives.improved_ddpm.Hybrid",
            "schedule": table,
            "preconditioning": preconditioning,
            "chain": {**chain, "timesteps": table, "variance": "learned"},
        }
    if prediction == "epsilon" and table["_target_"] == TABLES["linear"]:
        return {**table, "_target_": "diffusion_pl.objectives.ddpm.DDPM"}
    weight: dict[str, Any] = {"_target_": f"{_PARTS}EpsWeight"}
    if prediction == "v_prediction":  # the squared error of v
        weight = {"_target_": f"{_PARTS}UnitOutput", "sigma_data": 1.0}
    return {
        "_target_": f"{_PARTS}Objective",
        "schedule": table,
        "preconditioning": preconditioning,
        "weight": weight,
        "reduce": {"_target_": f"{_PARTS}pixel_mean", "_partial_": True},
    }


def _clip(config: Mapping[str, Any], usual: bool) -> Any:
    """A sampler's `clip_denoised`."""
    if flag(config, "thresholding", False):
        return {
            "_target_": "diffusion_pl.diffusion.guidance.thresholded",
            "_partial_": True,
            "share": real(config, "dynamic_thresholding_ratio", 0.995, 1.0),
            "most": real(config, "sample_max_value", 1.0),
        }
    if not flag(config, "clip_sample", usual):
        return False
    limit = real(config, "clip_sample_range", 1.0)
    return True if limit == 1 else limit


def _sampler(integrate: str, schedule: dict[str, Any], steps: int, **more: Any) -> dict[str, Any]:
    module = "dpm_solver" if integrate == "dpmpp_2m" else integrate
    where = f"diffusion_pl.samplers.{module}.{integrate}"
    settings = more.pop("integrator", {})
    return {
        "_target_": "diffusion_pl.samplers.sampler.Sampler",
        "integrate": {"_target_": where, "_partial_": True, **settings},
        "schedule": schedule,
        "steps": steps,
        "clip_denoised": False,
        **more,
    }


def _ddpm(config: Mapping[str, Any], name: str) -> Process:
    """The whole reverse chain."""
    table = _table(config, USUAL_BETAS)
    variance = _variance(config, "fixed_small")
    learned = variance == "learned"
    sampler = _sampler(
        "ancestral", table, _T(table), integrator={"variance": variance},
        clip_denoised=_clip(config, True), unit_start=True,
    )  # fmt: skip
    return Process(_objective(config, table, learned), sampler, learned=learned)


def _ddim(config: Mapping[str, Any], name: str) -> Process:
    """DDIM in 50 steps, or as near below as divides the table."""
    only(config, "set_alpha_to_one", True, True)
    table = _table(config, USUAL_BETAS)
    T = _T(table)
    steps = next(steps for steps in range(min(STEPS, T), 0, -1) if T % steps == 0)
    steps = steps if steps > 1 else min(STEPS, T)
    spacing: dict[str, Any] = {"_target_": "diffusion_pl.diffusion.spacings.Respaced", "T": T}
    notes: tuple[str, ...] = ()
    said = config.get("timestep_spacing", "leading")
    offset = whole(config, "steps_offset", 0, 0)
    if said == "trailing":
        spacing = {"_target_": "diffusion_pl.diffusion.spacings.Trailing", "T": T}
    elif said == "leading" and T % steps == 0 and offset < T // steps:
        spacing = {"_target_": "diffusion_pl.diffusion.spacings.DDIMUniform", "T": T}
        spacing |= {"offset": offset} if offset else {}
    elif said in ("leading", "linspace"):
        notes = (f"{name} steps past the levels of timestep_spacing {said}; here it visits them",)
    else:
        raise UserError(f"timestep_spacing: must be leading, trailing or linspace {got(said)}")
    clip = _clip(config, True)
    sampler = _sampler(
        "euler", table, steps, spacing=spacing, unit_start=True,
        integrator={} if clip is False else {"clip_denoised": clip},
    )  # fmt: skip
    return Process(_objective(config, table, learned=False), sampler, notes)


def _stand_in(config: Mapping[str, Any], name: str) -> Process:
    """A table of betas, walked by a solver of ours."""
    solver, betas = STAND_INS[name]
    only(config, "timestep_type", "discrete", "discrete")
    notes = (
        f"{name} steps otherwise than any sampler here; {solver} in {STEPS} steps stands in for it",
    )
    if flag(config, "use_flow_sigmas", False) or _prediction(config) == "flow_prediction":
        only(config, "use_flow_sigmas", False, True)
        only(config, "prediction_type", "epsilon", "flow_prediction")
        return _flow_of(config, real(config, "flow_shift", 1.0), solver, notes)
    table = _table(config, betas)
    learned = _variance(config, None) == "learned"
    steps = min(STEPS, _T(table))
    spacing = {"_target_": "diffusion_pl.diffusion.spacings.Respaced", "T": _T(table)}
    sampler = _sampler(
        solver, table, steps, spacing=spacing, clip_denoised=_clip(config, False), unit_start=True
    )
    return Process(_objective(config, table, learned), sampler, notes, learned)


def _flow(config: Mapping[str, Any], name: str) -> Process:
    for key, usual in {
        "use_dynamic_shifting": False, "invert_sigmas": False, "shift_terminal": None,
        "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
        "stochastic_sampling": False,
    }.items():  # fmt: skip
        only(config, key, usual, usual)
    solver = FLOW_STAND_INS.get(name, "euler")
    notes: tuple[str, ...] = ()
    if solver != "euler":
        notes = (f"{name} steps otherwise; {solver} in {STEPS} steps stands in for it",)
    return _flow_of(config, real(config, "shift", 1.0), solver, notes)


def _flow_of(
    config: Mapping[str, Any], shift: float, solver: str, notes: tuple[str, ...]
) -> Process:
    """A network that predicts noise minus image on a straight path, with shifted times."""
    T = whole(config, "num_train_timesteps", 1000, 2, 100_000)
    flow = "diffusion_pl.objectives.rectified_flow."
    path = {"_target_": f"{flow}Straight", "shift": shift}
    along = {"_target_": "diffusion_pl.diffusion.paths.Along", "path": path}
    objective = {
        "_target_": f"{_PARTS}Objective",
        "schedule": {**along, "start": FLOW_EDGE, "end": 1 - FLOW_EDGE},
        "preconditioning": {"_target_": f"{flow}PredictFlow", "scale": float(T)},
        "weight": {"_target_": f"{flow}FlowWeight"},
        "reduce": {"_target_": f"{_PARTS}pixel_mean", "_partial_": True},
    }
    # Their last time is that of the table's first timestep, shifted, and then shifted once more.
    last = shift / T / (1 + (shift - 1) / T)
    levels = {**along, "start": last, "end": FLOW_START}
    return Process(objective, _sampler(solver, levels, STEPS), notes)


def _edm(config: Mapping[str, Any], name: str) -> Process:
    """EDM's preconditioning over its noise range."""
    sigma_data = real(config, "sigma_data", 0.5)
    low, high = real(config, "sigma_min", 0.002), real(config, "sigma_max", 80.0)
    prediction = choice(
        config, "prediction_type", "epsilon", {"epsilon": False, "v_prediction": True}
    )
    only(config, "final_sigmas_type", "zero", "zero")
    only(config, "thresholding", False, False)
    solver = "euler"
    if name == "EDMDPMSolverMultistepScheduler":
        solver = "dpmpp_2m"
        for key, ours in {
            "solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint",
            "lower_order_final": True, "euler_at_final": False,
        }.items():  # fmt: skip
            only(config, key, ours, ours)
    schedules = "diffusion_pl.diffusion.schedules."
    schedule = {"_target_": f"{schedules}LogUniform", "sigma_min": low, "sigma_max": high}
    kind = choice(config, "sigma_schedule", "karras", {"karras": "Rho", "exponential": ""})
    if kind == "Rho":
        schedule |= {"_target_": f"{schedules}Rho", "rho": real(config, "rho", 7.0)}
    objective: dict[str, Any] = {"_target_": "diffusion_pl.objectives.edm.EDM"}
    objective |= {"sigma_data": sigma_data}
    if prediction:
        objective = {
            "_target_": f"{_PARTS}Objective",
            "schedule": {"_target_": f"{schedules}LogNormal", "mean": -1.2, "std": 1.2},
            "preconditioning": {
                "_target_": "diffusion_pl.diffusion.preconditioning.Karras",
                "sigma_data": sigma_data,
                "velocity": True,
            },
            "weight": {"_target_": f"{_PARTS}UnitOutput", "sigma_data": sigma_data},
            "reduce": {"_target_": f"{_PARTS}pixel_sum", "_partial_": True},
        }
    return Process(objective, _sampler(solver, schedule, STEPS, unit_start=True))


READERS: dict[str, Callable[[Mapping[str, Any], str], Process]] = {
    "DDPMScheduler": _ddpm,
    "DDPMParallelScheduler": _ddpm,
    "DDIMScheduler": _ddim,
    "DDIMParallelScheduler": _ddim,
    "EDMEulerScheduler": _edm,
    "EDMDPMSolverMultistepScheduler": _edm,
    "FlowMatchEulerDiscreteScheduler": _flow,
    **dict.fromkeys(FLOW_STAND_INS, _flow),
    **dict.fromkeys(STAND_INS, _stand_in),
}
