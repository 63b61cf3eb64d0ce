"""How far the policy is from ``exp(Q / ent_coef) / Z``: figures, pictures, a callback."""

from sb3_dqs.diagnostics.callback import DiagnosticCallback
from sb3_dqs.diagnostics.diagnose import Diagnosis, compare, diagnose
from sb3_dqs.diagnostics.metrics import box_grid, sliced_wasserstein
from sb3_dqs.diagnostics.plot import plot_policy

__all__ = ["Diagnosis", "DiagnosticCallback", "box_grid", "compare", "diagnose", "plot_policy", "sliced_wasserstein"]
