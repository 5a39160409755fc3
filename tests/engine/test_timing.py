"""Times of stages on a GPU, whose events are made up here: nothing waits, and nothing piles up."""

from types import SimpleNamespace

import torch

from medvl_sam2.engine.timing import Stages


def test_marks_are_added_up_as_they_end_and_waited_for_only_when_asked(monkeypatch):
    clock, done, waited = [0.0], [0.0], []

    class Event:
        def record(self, stream):
            clock[0] += 1.0
            self.at = clock[0]

        def query(self):
            return self.at <= done[0]

        def synchronize(self):
            waited.append(self.at > done[0])

        def elapsed_time(self, last):
            return 1000 * (last.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    stages = Stages(SimpleNamespace(type="cuda"))
    part = stages.part()
    for number in range(100):
        # The stream is some steps behind the host.
        done[0] = clock[0] - 10
        with part.measure("language" if number % 2 else "masks"):
            pass
    assert not any(waited), "the host waits for nothing"
    assert len(stages._marks) < 10 and len(part._marks) < 10
    assert dict(part) == {"masks": 50.0, "language": 50.0}
    assert dict(stages) == {"masks": 150.0, "language": 150.0}
    assert any(waited), "a time that is asked for is waited for"
