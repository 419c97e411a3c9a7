"""The command `audioldm2`: prompts in, audio files out.

    main.py            the command: one prompt, or the batch or the page
    options.py         its options
    progress_bar.py    progress on a terminal
    report.py          what is printed about a result, for people and as JSON
    playback.py        playing a file
    batch_command.py   `--prompts FILE --output-dir DIR`
    prompts_file.py    the file of prompts
    batch.py           many generations at once, which survive restarts of the server
    results_folder.py  the folder that they fill

Importing the package imports none of it.
"""
