import threading

from ds_seg.supervision import progress


def test_only_the_main_thread_gets_this_rank_on():
    """A checkpoint that is written in the background must not hide that training hangs."""
    before = progress.current().ticks
    thread = threading.Thread(target=progress.tick)
    thread.start()
    thread.join()
    assert progress.current().ticks == before
    progress.tick()
    assert progress.current().ticks == before + 1
