"""Free what a killed Train controller had reserved.

Ray's own cleaner learns of a placement group only when its workers have started. Of a controller
that dies before that the reservation stays, granted or still asked for, until the driver ends; and
the driver waits for the room that it takes.
"""

import logging
import time

log = logging.getLogger("prunefleet")

LOOK_EVERY_S = 5.0


class Orphans:
    """The placement groups of this driver's own job whose creating actor is dead."""

    def __init__(self) -> None:
        self._due = 0.0

    def free(self) -> None:
        """Remove them. Cheap to call often: it looks every few seconds."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + LOOK_EVERY_S
        import ray
        from ray import PlacementGroupID
        from ray._private.state import state
        from ray.core.generated.gcs_pb2 import PlacementGroupTableData
        from ray.util.placement_group import PlacementGroup, remove_placement_group

        job = bytes.fromhex(ray.get_runtime_context().get_job_id())
        for data in state._connect_and_get_accessor().get_placement_group_table():
            group = PlacementGroupTableData.FromString(data)
            is_held = group.creator_job_id == job and group.state != PlacementGroupTableData.REMOVED
            by_an_actor = any(byte != 0xFF for byte in group.creator_actor_id)  # else by us
            if is_held and by_an_actor and group.creator_actor_dead:
                log.warning("freeing what a dead Train run had reserved")
                remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
