"""What every test relies on."""

import signal

# a suite that runs in the background is born with Ctrl-C ignored, and so would be every process that it starts
signal.signal(signal.SIGINT, signal.default_int_handler)
