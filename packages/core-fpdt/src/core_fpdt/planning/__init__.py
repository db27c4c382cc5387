"""What a training step will need and take, before anything is allocated."""

from core_fpdt.planning.hardware import HARDWARE as HARDWARE, Hardware as Hardware
from core_fpdt.planning.plan import Plan as Plan, fitted as fitted, plan as plan
from core_fpdt.planning.shape import SHAPES as SHAPES, ModelShape as ModelShape
