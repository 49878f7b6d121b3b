"""What a driver looks after while its jobs run: what the dead have reserved, and its own node.

A Train controller that is killed leaves its placement group behind unless its workers had started:
Ray's own cleaner is told of it only then. Until the driver ends the reservation stays, granted or
still asked for, and the driver waits for the room that it takes.

A driver whose node dies hears nothing of it and waits for ever.
"""

import logging
import time

from jobs.errors import LostError

LOOK_EVERY_S = 5.0

log = logging.getLogger("prunefleet")


class Upkeep:
    """Of the driver that we are, connected to Ray."""

    def __init__(self) -> None:
        import ray

        context = ray.get_runtime_context()
        self.node_id: str = context.get_node_id()
        self.job_id = bytes.fromhex(context.get_job_id())
        self._due = 0.0

    def see_to_it(self) -> None:
        """Cheap to call often: it looks every few seconds.

        Raises:
            LostError: our node is dead.
        """
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + LOOK_EVERY_S
        self._check_node()
        self._free_orphans()

    def _check_node(self) -> None:
        import ray

        if any(node["NodeID"] == self.node_id and not node["Alive"] for node in ray.nodes()):
            raise LostError(
                "the node of the cluster that this command was connected to is dead. What is "
                "finished is kept: run the sweep again"
            )

    def _free_orphans(self) -> None:
        """Remove the placement groups of our own job whose creating actor is dead."""
        from ray import PlacementGroupID
        from ray._private.state import state
        from ray.core.generated.gcs_pb2 import PlacementGroupTableData
        from ray.util.placement_group import PlacementGroup, remove_placement_group

        for data in state._connect_and_get_accessor().get_placement_group_table():
            group = PlacementGroupTableData.FromString(data)
            is_ours = group.creator_job_id == self.job_id
            is_held = group.state != PlacementGroupTableData.REMOVED
            by_an_actor = any(byte != 0xFF for byte in group.creator_actor_id)  # else by us
            if is_ours and is_held and by_an_actor and group.creator_actor_dead:
                log.warning("freeing what a dead Train run had reserved")
                remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
