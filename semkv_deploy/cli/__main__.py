from semkv_deploy.cli import main

main()
