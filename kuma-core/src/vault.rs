//! The keys of a store: which entity has which key, and how it is unwrapped.
//!
//! Invariants:
//! - A new key is durable in `keys.db` before anything is sealed with it.
//! - A key leaves this module only to seal or open its own entity's rows.

use std::{collections::HashMap, sync::Arc, time::SystemTime};

use futures_util::{StreamExt, TryStreamExt, stream};
use kuma_crypto::{
    DataKey, IdHash, IdSecret, KeyId, MasterKey, Secret32, SigningKey, id_secret_aad, node_key_aad, wrap_aad,
};
use kuma_shard::{EntityHash, KeyRow, KeyStore};

use crate::{VaultError, audit, micros};

/// Under this name `keys.db` holds the secret that keys the id hashes.
pub(crate) const ID_SECRET: &str = "id_secret";
/// And under this one the key of the audit log, which is made with the store: whoever has a copy of the keys, however old, can go on with that log.
const AUDIT_SECRET: &str = "audit_key";
/// What that key is called.
pub(crate) const AUDIT_KEY: KeyId = KeyId(*b"kuma audit log 1");
/// And under this one the key that signs receipts.
pub(crate) const NODE_KEY: &str = "node_key";

const UNWRAPPED_AT_ONCE: usize = 16;

pub(crate) struct Vault {
    pub(crate) keys: KeyStore,
    master: Arc<dyn MasterKey>,
    context: String,
    pub(crate) ids: IdSecret,
    node_key: SigningKey,
}

impl Vault {
    /// Opens the vault of a store, or gives a new store its secret: that of its cluster, if there is one.
    pub(crate) async fn open(
        keys: KeyStore,
        master: Arc<dyn MasterKey>,
        context: String,
        is_new: bool,
        given: Option<IdSecret>,
    ) -> Result<Self, VaultError> {
        let aad = id_secret_aad(&context);
        let ids = match keys.secret(ID_SECRET).await? {
            Some(wrapped) => IdSecret::from(master.unwrap(&wrapped, &aad).await?),
            None if is_new => {
                let ids = given.unwrap_or_else(IdSecret::generate);
                let secret: &Secret32 = ids.as_ref();
                keys.put_secret(ID_SECRET, master.wrap(secret, &aad).await?).await?;
                ids
            }
            None => return Err(VaultError::SecretMissing { name: ID_SECRET }),
        };
        let aad = node_key_aad(&context);
        let node_key = match keys.secret(NODE_KEY).await? {
            Some(wrapped) => SigningKey::from(master.unwrap(&wrapped, &aad).await?),
            None if is_new => {
                let node_key = SigningKey::generate();
                keys.put_secret(NODE_KEY, master.wrap(node_key.as_ref(), &aad).await?).await?;
                node_key
            }
            None => return Err(VaultError::SecretMissing { name: NODE_KEY }),
        };
        let vault = Vault { keys, master, context, ids, node_key };
        if is_new {
            let key = DataKey::generate();
            let wrapped = vault.master.wrap(key.as_ref(), &vault.audit_aad()).await?;
            vault.keys.put_secret(AUDIT_SECRET, wrapped).await?;
        }
        Ok(vault)
    }

    /// A new key for an entity; durable when this returns.
    pub(crate) async fn create(&self, entity: EntityHash) -> Result<(KeyId, DataKey), VaultError> {
        let (key_id, key) = (KeyId::generate(), DataKey::generate());
        let wrapped = self.master.wrap(key.as_ref(), &self.aad(entity, key_id)).await?;
        let created_at_us = micros(SystemTime::now());
        self.keys.add(KeyRow { key_id: key_id.0, id_hash: entity, wrapped, created_at_us }).await?;
        Ok((key_id, key))
    }

    /// Keeps keys that came with a slot, wrapped for this node; durable when this returns. What there is already stays.
    pub(crate) async fn install(&self, keys: &[(EntityHash, KeyId, DataKey, i64)]) -> Result<(), VaultError> {
        if keys.is_empty() {
            return Ok(());
        }
        // A key management service is asked for several at once.
        let wrapped: Vec<_> = keys.iter().map(|key| self.wrap_row(key)).collect();
        let rows = stream::iter(wrapped).buffered(UNWRAPPED_AT_ONCE).try_collect().await?;
        Ok(self.keys.install(rows).await?)
    }

    async fn wrap_row(
        &self,
        (entity, key_id, key, created_at_us): &(EntityHash, KeyId, DataKey, i64),
    ) -> Result<KeyRow, VaultError> {
        let wrapped = self.master.wrap(key.as_ref(), &self.aad(*entity, *key_id)).await?;
        Ok(KeyRow { key_id: key_id.0, id_hash: *entity, wrapped, created_at_us: *created_at_us })
    }

    /// What signs receipts.
    pub(crate) fn node_key(&self) -> &SigningKey {
        &self.node_key
    }

    /// The key with this name.
    pub(crate) async fn key(&self, entity: EntityHash, key_id: KeyId) -> Result<DataKey, VaultError> {
        if key_id == AUDIT_KEY {
            let wrapped = self.keys.secret(AUDIT_SECRET).await?.ok_or(VaultError::KeyMissing)?;
            return Ok(DataKey::from(self.master.unwrap(&wrapped, &self.audit_aad()).await?));
        }
        let row = self.keys.get(key_id.0).await?.ok_or(VaultError::KeyMissing)?;
        if row.is_destroyed() {
            return Err(VaultError::KeyDestroyed);
        }
        Ok(DataKey::from(self.master.unwrap(&row.wrapped, &self.aad(entity, key_id)).await?))
    }

    /// The keys with these names, of these entities, in this order; each as [`Vault::key`] would give it.
    pub(crate) async fn keys(
        &self,
        wanted: &[(EntityHash, KeyId)],
    ) -> Result<Vec<Result<DataKey, VaultError>>, VaultError> {
        let names: Vec<[u8; 16]> = wanted.iter().map(|(_, key_id)| key_id.0).collect();
        let rows = self.keys.get_many(&names).await?;
        let rows: HashMap<[u8; 16], KeyRow> = rows.into_iter().map(|row| (row.key_id, row)).collect();
        let key = |(entity, key_id): &(EntityHash, KeyId)| {
            let (entity, key_id, row) = (*entity, *key_id, rows.get(&key_id.0));
            async move {
                match row {
                    // The audit log's stands elsewhere.
                    None => self.key(entity, key_id).await,
                    Some(row) if row.is_destroyed() => Err(VaultError::KeyDestroyed),
                    Some(row) => Ok(DataKey::from(self.master.unwrap(&row.wrapped, &self.aad(entity, key_id)).await?)),
                }
            }
        };
        // A key management service is asked for several at once.
        Ok(stream::iter(wanted).map(key).buffered(UNWRAPPED_AT_ONCE).collect().await)
    }

    /// Whether keys are unwrapped in this process.
    pub(crate) fn is_local(&self) -> bool {
        self.master.is_local()
    }

    /// Wraps every key that is not under the current master key anew. Returns how many. It can be interrupted at any point and
    /// started again: a key is under one master key or the other, and both open it until the older one is taken away.
    pub(crate) async fn rewrap_all(&self) -> Result<u64, VaultError> {
        let (mut after, mut rewrapped) = (0, 0);
        let secrets = [
            (ID_SECRET, id_secret_aad(&self.context)),
            (NODE_KEY, node_key_aad(&self.context)),
            (AUDIT_SECRET, self.audit_aad()),
        ];
        for (name, aad) in secrets {
            if let Some(wrapped) = self.keys.secret(name).await?
                && let Some(anew) = kuma_crypto::rewrap(&*self.master, &wrapped, &aad).await?
            {
                self.keys.put_secret(name, anew).await?;
            }
        }
        loop {
            let page = self.keys.page(after, 256).await?;
            let Some((last, _)) = page.last_key_value() else { return Ok(rewrapped) };
            after = *last;
            let mut changes = Vec::new();
            let mut failed = None;
            for row in page.values().filter(|row| !row.is_destroyed()) {
                let aad = self.aad(row.id_hash, KeyId(row.key_id));
                match kuma_crypto::rewrap(&*self.master, &row.wrapped, &aad).await {
                    Ok(Some(anew)) => changes.push(self.keys.rewrap(row.key_id, anew)),
                    Ok(None) => {}
                    // What was wrapped until then is not given up for it.
                    Err(error) => {
                        failed = Some(error);
                        break;
                    }
                }
            }
            rewrapped += changes.len() as u64;
            // Together, so that a page is one sync.
            futures_util::future::try_join_all(changes).await?;
            if let Some(error) = failed {
                return Err(error.into());
            }
        }
    }

    fn audit_aad(&self) -> Vec<u8> {
        self.aad(audit::entity_hash(&self.ids), AUDIT_KEY)
    }

    fn aad(&self, entity: EntityHash, key_id: KeyId) -> Vec<u8> {
        wrap_aad(&self.context, IdHash(entity.0), key_id)
    }
}
