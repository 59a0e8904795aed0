//! Asks before something that cannot be undone.

use std::io::{self, BufRead, IsTerminal, Write};

use anyhow::{Context, bail};

use super::{
    UsageError,
    output::{BAD, STRONG, printable},
};

/// Asks on the terminal for `word`, and fails unless it is typed.
///
/// # Errors
/// Something else was typed, or there is no terminal to ask on: `--yes` stands for the answer then.
pub(super) fn confirm(what: &str, word: &str) -> anyhow::Result<()> {
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        bail!(UsageError(format!("{what}: this cannot be undone, and there is no terminal to ask on; add --yes")));
    }
    confirm_on(&mut io::stdin().lock(), &mut anstream::stderr(), what, word)
}

fn confirm_on(answers: &mut impl BufRead, terminal: &mut impl Write, what: &str, word: &str) -> anyhow::Result<()> {
    let (what, shown) = (printable(what), printable(word));
    write!(terminal, "{BAD}{what}: this cannot be undone.{BAD:#}\nType {STRONG}{shown}{STRONG:#} to go on: ")
        .and_then(|()| terminal.flush())
        .context("cannot write to the terminal")?;
    let mut answer = String::new();
    answers.read_line(&mut answer).context("cannot read from the terminal")?;
    if !is_confirmed(&answer, word) {
        bail!("this is not what was asked for; nothing was done");
    }
    Ok(())
}

/// Whether the line is the word, or the word as it was shown: a terminal cannot type everything that an id may hold.
fn is_confirmed(line: &str, word: &str) -> bool {
    let line = line.trim_end_matches(['\r', '\n']);
    !line.is_empty()
        && (line == word || line == printable(word) || (line.trim() == word.trim() && !line.trim().is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(answer: &str, word: &str) -> (bool, String) {
        let mut terminal = Vec::new();
        let is_ok = confirm_on(&mut answer.as_bytes(), &mut terminal, "erase customer/x", word).is_ok();
        (is_ok, anstream::adapter::strip_str(&String::from_utf8(terminal).unwrap()).to_string())
    }

    #[test]
    fn only_the_id_itself_confirms() {
        assert!(ask("c-7\n", "c-7").0 && ask("c-7\r\n", "c-7").0 && ask(" c-7 \n", "c-7").0 && ask("c-7", "c-7").0);
        for answer in ["", "\n", "y\n", "yes\n", "c-8\n", "C-7\n", "c-7 c-7\n"] {
            assert!(!ask(answer, "c-7").0, "{answer:?}");
        }
    }

    #[test]
    fn an_id_that_cannot_be_typed_is_confirmed_as_it_is_shown() {
        let (is_ok, shown) = ask("a\\u001bb\n", "a\u{1b}b");
        assert!(is_ok && shown.ends_with("Type a\\u001bb to go on: "), "{shown:?}");
        assert!(!ask("\n", "\n").0);
    }
}
