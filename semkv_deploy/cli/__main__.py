from semkv_deploy.cli.commands import main

main()
