"""What every program here needs, and what finds, names, locks, lists and reports on runs.

    cli      errors and messages, a program's start, end and exit status, lines on a terminal
    files    folders, locks, files that appear whole, hashes
    flags    the table of flags, the types of their values, the parser, YAML files of flags
    machine  what this process may use: cores, memory, a folder for compiled code
    device   what computes: CPU or GPU, the processes that share a run, their environment
    code     which files are the code of a run; keeping them, comparing them
    runs     records of checkpoints; which run a command means, its name, folder and lock
    reports  what a run says of itself: start screen, progress, log.csv, last lines

Nothing here imports from the files above: datasets.py, main.py, extras/. No file here makes a
command train another run. But runs record a hash of all of them, as they record MLX's version.
"""
