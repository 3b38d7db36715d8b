"""The command line: `dqa-plugins inspect | doctor | compare | export`, each named as the call that it stands for."""
