"""NeMo-RL's losses where only its source is on the path.

Its loss modules import a logger that they do not use, which needs clients of logging services: it
gets a stand-in. With NeMo-RL installed the losses are audited under their own names.
"""

from __future__ import annotations

import importlib
import os
import sys
from unittest.mock import MagicMock

os.environ.setdefault("NRL_LOG_LEVEL", "WARNING")
sys.modules.setdefault("nemo_rl.utils.logger", MagicMock(name="nemo_rl.utils.logger"))

_losses = importlib.import_module("nemo_rl.algorithms.loss.loss_functions")

DistillationLossFn = _losses.DistillationLossFn
ClippedPGLossFn = _losses.ClippedPGLossFn
