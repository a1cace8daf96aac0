"""Test tools for who writes a backend: a conformance suite, and the faults of networks and servers.

    from blackbox_vlm.testing import BackendConformance

    class TestMyBackend(BackendConformance):
        def make_backend(self):
            return MyBackend(endpoint="http://127.0.0.1:8000")

A backend that speaks to a server also says how to reach another one (`make_remote`) and what a
right answer looks like (`good_answer`); the suite then runs the whole fault matrix against it.
"""

from blackbox_vlm.testing.clock import FakeClock
from blackbox_vlm.testing.conformance import BackendConformance
from blackbox_vlm.testing.faults import FaultMatrix
from blackbox_vlm.testing.server import Act, Received, ScriptedServer

__all__ = ["Act", "BackendConformance", "FakeClock", "FaultMatrix", "Received", "ScriptedServer"]
