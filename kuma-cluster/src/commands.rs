//! Commands and kinds that can be asked of any node: what their names stand for.

use std::{collections::HashMap, sync::Arc};

use futures_util::future::BoxFuture;
use kuma_core::{Command, Entity, ExecuteError, Kuma, Metadata, NewEvent, Refused, Version};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    requests::failed,
    wire::{self, Failure, Reply},
};

/// What a command is carried out with.
pub(crate) struct Call {
    pub(crate) kuma: Kuma,
    pub(crate) id: String,
    pub(crate) fields: Vec<u8>,
    pub(crate) expected: Option<Version>,
    pub(crate) key: Vec<u8>,
    pub(crate) metadata: Option<Metadata>,
}

type Run = Arc<dyn Fn(Call) -> BoxFuture<'static, Result<Reply, kuma_core::AppendError>> + Send + Sync>;
type Register = Arc<dyn Fn(&Kuma) -> Result<(), Refused> + Send + Sync>;

/// Those of a node. Every node of a cluster is to know the same ones.
#[derive(Clone, Default)]
pub(crate) struct Commands {
    run: HashMap<(&'static str, String), Run>,
    kinds: Vec<Register>,
}

impl Commands {
    pub(crate) fn kind<E: Entity>(&mut self) {
        self.kinds.push(Arc::new(|kuma| kuma.register::<E>()));
    }

    pub(crate) fn command<E, C>(&mut self)
    where
        E: Entity,
        C: Command<E> + Serialize + DeserializeOwned,
        C::Rejection: Serialize + DeserializeOwned,
    {
        let run: Run = Arc::new(|call| Box::pin(run::<E, C>(call)));
        self.run.insert((E::KIND, C::name().to_owned()), run);
    }

    /// Makes the kinds known to the store.
    pub(crate) fn register(&self, kuma: &Kuma) -> Result<(), Refused> {
        self.kinds.iter().try_for_each(|register| register(kuma))
    }

    pub(crate) fn find(&self, kind: &str, command: &str) -> Option<Run> {
        self.run.iter().find(|((of, name), _)| *of == kind && name == command).map(|(_, run)| run.clone())
    }
}

async fn run<E, C>(call: Call) -> Result<Reply, kuma_core::AppendError>
where
    E: Entity,
    C: Command<E> + Serialize + DeserializeOwned,
    C::Rejection: Serialize,
{
    let Call { kuma, id, fields, expected, key, metadata } = call;
    let Some(command) = wire::decode::<C>(&fields) else {
        let name = C::name();
        let why = format!("the fields of command {name} cannot be read here; the nodes run different versions");
        return Ok(Reply::Failed(Failure::Refused(why)));
    };
    let entity = kuma.entity::<E>(id);
    let mut execute = entity.execute(command).idempotency_key(key);
    if let Some(expected) = expected {
        execute = execute.expecting(expected);
    }
    if let Some(metadata) = metadata {
        execute = execute.metadata(metadata);
    }
    match execute.await {
        Ok(executed) => {
            let (version, repeated) = (executed.version(), executed.is_repeated());
            let events: Result<Vec<NewEvent>, Refused> = executed.events().iter().map(NewEvent::typed::<E>).collect();
            Ok(match events {
                Ok(events) => Reply::Executed { version, events, repeated },
                Err(refused) => failed(kuma_core::AppendError::Refused(refused)),
            })
        }
        Err(ExecuteError::Rejected(rejection)) => Ok(Reply::Rejected(wire::encode(&rejection))),
        Err(ExecuteError::Failed(error)) => Err(error),
    }
}
