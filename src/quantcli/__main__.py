"""`python -m quantcli` is the same command as `quantcli`."""

from quantcli.cli.app import main

if __name__ == "__main__":
    main()
