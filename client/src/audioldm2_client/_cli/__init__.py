"""The command `audioldm2`: prompts in, audio files out.

    main.py            the command: one prompt, or whichever of the others is asked for
    options.py         its options, and what they mean for a generation
    progress_bar.py    what a terminal shows of a generation under way
    report.py          what is printed about a result, for people and as JSON
    playback.py        playing a file
    batch_command.py   `--prompts FILE --output-dir DIR`
    prompts_file.py    the file of prompts
    batch.py           many generations at once, which outlive the server's restarts
    results_folder.py  the folder that they fill

Importing the package imports none of it.
"""
