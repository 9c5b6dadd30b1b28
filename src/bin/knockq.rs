//! The `knockq` command.

fn main() -> std::process::ExitCode {
    knockq::cli::main()
}
