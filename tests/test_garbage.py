"""What a run makes is collected in it; what was there before is left until its end."""

from __future__ import annotations

import gc
import weakref

from plquant.garbage import only_new


class Cycle:
    def __init__(self) -> None:
        self.own = self


def test_only_what_is_made_within_is_looked_at() -> None:
    old = Cycle()
    was = weakref.ref(old)
    with only_new():
        new = Cycle()
        fresh = weakref.ref(new)
        del old, new
        gc.collect()
        assert fresh() is None and was() is not None
    gc.collect()
    assert was() is None and gc.get_freeze_count() == 0
