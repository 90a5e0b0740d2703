"""Tokens: who gets in, for how long, and that the secret is nowhere; and identities under a seal."""

import sqlite3
from dataclasses import asdict
from datetime import datetime, timedelta, timezone

import pytest

from finetuner.excepts import ConfigError, NotFoundError
from finetuner.server.identity import IdentitySeal
from finetuner.server.security import TokenCheck, is_foreign, is_rebound, refuse_open_server
from finetuner.storage import tokens as module
from finetuner.storage.database import open_database
from finetuner.storage.tokens import Identity, TokenStore


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'tokens.db'


@pytest.fixture
def tokens(path):
    return TokenStore(open_database(f'sqlite:///{path}'))


def test_a_token_says_who_it_belongs_to(tokens):
    secret, token = tokens.create('alice', 'read', description='a notebook')
    assert tokens.identify(secret) == Identity('alice', 'read')
    assert (token.user, token.scope, token.description) == ('alice', 'read', 'a notebook')
    assert tokens.list() == tokens.list('alice')
    assert tokens.list('bob') == []
    assert tokens.list()[0].used_at is not None


def test_the_secret_is_nowhere(tokens, path):
    secret, token = tokens.create('alice')
    tokens.identify(secret)
    tokens._database.close()
    with sqlite3.connect(path) as database:
        stored = '\n'.join(database.iterdump())
    hidden = secret.rpartition('_')[2]
    assert token.id in stored
    assert secret.split('_', 2)[2] not in stored
    assert hidden not in stored
    assert secret.split('_', 2)[2] not in str(asdict(token))


def test_every_token_is_another(tokens):
    assert len({tokens.create('alice')[0] for _ in range(50)}) == 50


@pytest.mark.parametrize(
    'change',
    [
        lambda s: '',
        lambda s: s[:-1],
        lambda s: s + 'A',
        lambda s: s[:-1] + ('A' if s[-1] != 'A' else 'B'),
        lambda s: s.replace('ft_', 'FT_'),
        lambda s: s.upper(),
        lambda s: 'ft_000000000000_' + s.split('_', 2)[2],
        lambda s: s + '\n',
        lambda s: 'é' + s,
    ],
)
def test_what_is_no_token_lets_nobody_in(tokens, change):
    secret, _ = tokens.create('alice')
    assert tokens.identify(change(secret)) is None


def test_a_token_ends_by_hand_at_once(tokens):
    secret, token = tokens.create('alice')
    other, _ = tokens.create('alice')
    assert tokens.identify(secret)
    ended = tokens.revoke(token.id)
    assert ended.revoked_at is not None
    assert tokens.identify(secret) is None
    assert tokens.identify(other)
    assert tokens.revoke(secret).revoked_at == ended.revoked_at
    with pytest.raises(NotFoundError, match=token.id[:6]):
        tokens.revoke(token.id[:-1])


def test_a_token_ends_by_time(tokens, monkeypatch):
    secret, token = tokens.create('alice', days=2)
    made = datetime.fromisoformat(token.created_at)
    assert datetime.fromisoformat(token.expires_at) - made == timedelta(days=2)
    monkeypatch.setattr(module, '_now', lambda: made + timedelta(days=2, seconds=-1))
    assert tokens.identify(secret)
    monkeypatch.setattr(module, '_now', lambda: made + timedelta(days=2))
    assert tokens.identify(secret) is None
    # a clock that was set back does not matter to a token that was revoked
    tokens.revoke(token.id)
    monkeypatch.setattr(module, '_now', lambda: made - timedelta(days=900))
    assert tokens.identify(secret) is None


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'user': ''}, 'cannot name a user'),
        ({'user': 'a b'}, 'cannot name a user'),
        ({'user': '../x'}, 'cannot name a user'),
        ({'user': 'a' * 101}, 'cannot name a user'),
        ({'user': 'a', 'scope': 'wirte'}, "did you mean 'write'"),
        ({'user': 'a', 'days': 0}, '0 days'),
        ({'user': 'a', 'days': float('nan')}, 'nan days'),
        ({'user': 'a', 'description': 'x' * 201}, '200'),
        ({'user': 'a', 'description': 'x\ny'}, 'printable'),
    ],
)
def test_bad_tokens_are_refused(tokens, arguments, message):
    with pytest.raises(ConfigError, match=message):
        tokens.create(**arguments)
    assert not tokens.any()


def test_scopes_include_each_other():
    read, write, admin = (Identity('a', scope) for scope in ('read', 'write', 'admin'))
    assert [read.may(s) for s in ('read', 'write', 'admin')] == [True, False, False]
    assert [write.may(s) for s in ('read', 'write', 'admin')] == [True, True, False]
    assert [admin.may(s) for s in ('read', 'write', 'admin')] == [True, True, True]


# the check at the door


def test_without_any_token_everybody_is_the_machines_own_user(tokens):
    check = TokenCheck(None, tokens)
    assert not check.required
    assert check.identify(None) == check.identify('Bearer x') == Identity('', 'admin')


def test_once_a_token_was_made_nobody_gets_in_without(tokens):
    check = TokenCheck(None, tokens)
    assert check.identify(None)
    secret, token = tokens.create('alice')
    assert check.required
    assert check.identify(None) is None
    assert check.identify(secret) is None
    assert check.identify(f'Bearer {secret}') == Identity('alice', 'write')
    assert check.identify(f'Bearer {secret}'.encode()) == Identity('alice', 'write')
    tokens.revoke(token.id)
    assert check.identify(f'Bearer {secret}') is None
    assert check.identify(None) is None


def test_the_token_of_the_environment_is_the_machines_own_user(tokens):
    check = TokenCheck('secret', tokens)
    assert check.required
    assert check.identify('Bearer secret') == Identity('', 'admin')
    for wrong in (None, '', 'secret', 'Bearer', 'Bearer secre', 'Bearer secret ', 'bearer secret'):
        assert check.identify(wrong) is None
    secret, _ = tokens.create('alice')
    assert check.identify(f'Bearer {secret}') == Identity('alice', 'write')


def test_an_open_server_is_refused_until_there_is_a_token(tokens):
    check = TokenCheck(None, tokens)
    refuse_open_server('127.0.0.1', check)
    with pytest.raises(ConfigError, match='finetuner token create'):
        refuse_open_server('0.0.0.0', check)
    tokens.create('alice')
    refuse_open_server('0.0.0.0', check)


@pytest.mark.parametrize(
    ('origin', 'host', 'expected'),
    [
        (None, 'a:1', False),
        ('http://a:1', 'a:1', False),
        ('https://A:1', 'a:1', False),
        ('http://a:2', 'a:1', True),
        ('http://b:1', 'a:1', True),
        ('null', 'a:1', True),
        ('http://a:1.evil.example', 'a:1', True),
        ('http://evil.example/a:1', 'a:1', True),
        ('http://a:1', None, True),
    ],
)
def test_pages_of_other_servers_are_known(origin, host, expected):
    assert is_foreign(origin, host) is expected


@pytest.mark.parametrize(
    ('host', 'expected'),
    [
        ('127.0.0.1:51080', False),
        ('localhost:1', False),
        ('[::1]:1', False),
        (None, False),
        ('evil.example:51080', True),
        ('127.0.0.1.evil.example', True),
        ('192.168.0.7:51080', True),
    ],
)
def test_names_that_lead_here_and_are_not_ours(host, expected):
    assert is_rebound(host) is expected


# identities on their way to an Executor


def test_an_identity_comes_out_as_it_went_in(tmp_path, monkeypatch):
    monkeypatch.delenv('FINETUNER_GATEWAY_KEY', raising=False)
    identity = Identity('alice', 'write')
    sealed = IdentitySeal.of_home(tmp_path / 'home').seal(identity)
    assert IdentitySeal.of_home(tmp_path / 'home').open(sealed) == identity
    assert (tmp_path / 'home' / 'gateway.key').stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match='gateway'):
        IdentitySeal.of_home(tmp_path / 'another').open(sealed)


@pytest.mark.parametrize('forged', ['', '.', 'x.y', None, 7, 'é.é', 'W10=.'])
def test_what_nobody_sealed_is_refused(tmp_path, forged):
    with pytest.raises(ConfigError, match='gateway'):
        IdentitySeal(b'key').open(forged)


def test_another_name_under_the_same_seal_is_refused():
    seal = IdentitySeal(b'key')
    content, _, signature = seal.seal(Identity('alice', 'read')).partition('.')
    other = seal.seal(Identity('alice', 'admin')).partition('.')[0]
    with pytest.raises(ConfigError, match='gateway'):
        seal.open(f'{other}.{signature}')
    assert seal.open(f'{content}.{signature}') == Identity('alice', 'read')


def test_all_who_ask_for_the_key_of_a_home_get_the_same(tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.delenv('FINETUNER_GATEWAY_KEY', raising=False)
    with ThreadPoolExecutor(8) as pool:
        seals = list(pool.map(lambda _: IdentitySeal.of_home(tmp_path)._key, range(32)))
    assert len(set(seals)) == 1
    assert len(seals[0]) == 64
    assert [p.name for p in tmp_path.iterdir()] == ['gateway.key']


def test_now_is_utc():
    assert module._now().tzinfo is timezone.utc
