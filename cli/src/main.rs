//! `shoal`: runs and manages guests by talking to `shoald`.

#![forbid(unsafe_code)]

mod client;
mod commands;
mod devices;
mod doctor;
mod error;
mod options;
mod output;
mod run;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::client::Client;
use crate::options::{Command, Options};

fn main() -> ExitCode {
    let options = Options::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(dispatch(options));
            // A thread that waits for the terminal's input must not hold the program.
            runtime.shutdown_background();
            result
        }
        Err(error) => Err(anyhow::Error::new(error).context("starting the runtime")),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprint!("{}", error::describe(&error));
            ExitCode::FAILURE
        }
    }
}

async fn dispatch(options: Options) -> anyhow::Result<ExitCode> {
    let client = Client::new(options.socket);
    let done = |()| ExitCode::SUCCESS;
    match options.command {
        Command::Run(run) => run::run(&client, *run).await,
        Command::Ps { all, json } => commands::ps(&client, all, json).await.map(done),
        Command::Show { guest, json } => commands::show(&client, &guest, json).await.map(done),
        Command::Logs { guest, follow } => commands::logs(&client, &guest, follow).await.map(done),
        Command::Start { guests } => commands::start(&client, &guests).await.map(done),
        Command::Stop { guests, timeout } => commands::stop(&client, &guests, timeout).await.map(done),
        Command::Limit {
            guest,
            device,
            limits,
        } => commands::limit(&client, &guest, &device, &limits).await.map(done),
        Command::Rm { guests, force } => commands::rm(&client, &guests, force).await.map(done),
        Command::Doctor { json, vmm } => doctor::doctor(json, vmm).await,
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Options::command(), "shoal", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    }
}
