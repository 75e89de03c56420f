"""What a process that forks the workers of a raylet sets once for all its forks; to be imported after Ray."""

from __future__ import annotations

from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    _AutoscalingCoordinatorActor,
)

# How often Ray looks which nodes there are for a training that takes those it finds: every 20 s by default, for which a
# training that has lost a node waits.
_AutoscalingCoordinatorActor.TICK_INTERVAL_S = 2
