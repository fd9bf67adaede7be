"""Settings of the baselines by preset and task, as data: what differs from OGPO's, in the form of settings/ogpo.py.

A baseline takes OGPO's row of a task (environment, cloning, sizes, critics, schedule: what is equal for all), then its
own row here, with the few values that belong to its method.
"""

Table = dict[tuple[str, str], dict]

QC: Table = {}
DSRL: Table = {}
EXPO: Table = {}
RESIDUAL: Table = {}
DPPO: Table = {}
QAM: Table = {}
QF3: Table = {}
RLPD: Table = {}
