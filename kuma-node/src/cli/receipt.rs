//! `receipt`: proofs of erasures.

use std::path::PathBuf;

use clap::Subcommand;

use super::{
    Exit, Session, input,
    output::{BAD, GOOD, printable},
};

/// What can be done with receipts.
#[derive(Debug, Subcommand)]
pub(super) enum ReceiptVerb {
    /// Print a receipt as it is now
    Show {
        /// Its name: 32 hex digits
        #[arg(value_name = "ID")]
        id: String,
    },
    /// Look again whether what a receipt says holds; exit code 4 if not
    Verify {
        /// The receipt; - for standard input
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
}

pub(super) async fn run(session: &Session, verb: ReceiptVerb) -> anyhow::Result<Exit> {
    let client = session.client()?;
    let output = &session.output;
    match verb {
        ReceiptVerb::Show { id } => {
            output.json(&client.receipt(&id).await?)?;
            Ok(Exit::Done)
        }
        ReceiptVerb::Verify { file } => {
            let receipt = input::json(&input::file(&file)?)?;
            let found = client.verify_receipt(&receipt).await?;
            if output.is_json() {
                output.json(&found)?;
            } else {
                for check in &found.checks {
                    let (style, word) = if check.is_ok { (GOOD, "ok    ") } else { (BAD, "FAILED") };
                    let text = format!("{}: {}", check.what, check.found);
                    output.line(format_args!("{style}{word}{style:#}  {}", printable(&text)))?;
                }
            }
            Ok(if found.is_clean { Exit::Done } else { Exit::Damage })
        }
    }
}
