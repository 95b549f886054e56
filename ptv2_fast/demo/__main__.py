"""`python -m ptv2_fast.demo`: quiet before anything large is imported, for some packages talk while they are."""

from ptv2_fast.demo.quiet import quiet

if __name__ == "__main__":
    with quiet():
        from ptv2_fast.demo.run import main

        main()
