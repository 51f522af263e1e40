"""Publishing under planned faults: main is the old version or the complete new one, always.

A *schedule* says what goes wrong at which request of a push. Each is run against a loopback Hub by
a process that does nothing but push (:mod:`driver`), which the server kills, cuts off or lies to;
then the same push is run again without faults. :mod:`schedules` lists them, :mod:`trial` runs one
and checks what must hold, :mod:`clients` has the two majors of huggingface_hub.

``python -m tests.faults`` runs all of them on both majors.
"""
